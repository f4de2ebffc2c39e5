"""Fixtures, guests and Hypothesis profiles that all tests share. Every run is deterministic."""

import sys
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("spte", derandomize=True, deadline=None, database=None, suppress_health_check=SLOW)
settings.load_profile("spte")

PAGE = 4096
LOG = 1
PRE_FAULT_MEMORY = 236
TDP_PLATFORMS = ("ept-pml", "ept-nopml", "ept-noad", "npt", "npt-pml")
PLATFORMS = (*TDP_PLATFORMS, *(name + "-rmap" for name in TDP_PLATFORMS), "shadow")
PML_PLATFORMS = tuple(name for name in PLATFORMS if "pml" in name.split("-"))
WP_PLATFORMS = tuple(name for name in PLATFORMS if name not in PML_PLATFORMS)
POLICIES = ("6.12", "6.1")
VERSIONS = ("5.10", "series", "5.15", "6.1", "6.12", "7.2")  # recorded ones, and one in between


@pytest.fixture(params=PLATFORMS)
def platform(request):
    return request.param


@pytest.fixture(params=TDP_PLATFORMS)
def platform_that_splits_in_place(request):
    """Only the TDP MMU splits a huge leaf, when logging begins, at CLEAR or at a fault; the shadow MMU drops it at a fault."""
    return request.param


@pytest.fixture(params=POLICIES)
def policy(request):
    return request.param


@pytest.fixture
def pool():
    """Runs calls on threads that give way to each other at once; one that never ends fails its test, and no more."""

    def submit(call, *args):
        future = Future()

        def work():
            try:
                future.set_result(call(*args))
            except BaseException as e:
                future.set_exception(e)

        threading.Thread(target=work, daemon=True).start()
        return future

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield SimpleNamespace(submit=submit)
    sys.setswitchinterval(before)


@pytest.fixture
def uninstall(monkeypatch):
    """A call that makes a package look as if it were not installed, and forgets the modules that were imported with it."""

    def forget(package, *users):
        for name in [name for name in sys.modules if any(name == top or name.startswith(top + ".") for top in (package, *users))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])
        missing.add(package)

    def find_spec(name, path=None, target=None):
        if name in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    missing = set()
    return forget


def pages_of(bitmap):
    """Numbers of the set bits of a dirty bitmap."""
    return set(np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little")).tolist())


def bitmap_of(pages, npages):
    """A dirty bitmap of `npages` pages with the bits of `pages` set."""
    bits = np.zeros(-(-npages // 64) * 64, np.uint8)
    bits[list(pages)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint64)


def has_rings(policy):
    """Whether a VM of that version may log to dirty rings."""
    from spte.policy import Policy

    return Policy.named(policy).dirty_ring


class Guest:
    """One slot at gfn `base` of a VM, and what a VMM does with it; pages are numbered from the slot's start."""

    def __init__(self, platform, policy="6.12", *, mode="get", kind="4k", npages=1024, base=512, populate=True, vcpus=1):
        import spte

        self.mode, self.base, self.npages, self.kind = mode, base, npages, kind
        manual = int(mode[-1]) if mode.startswith("manual") else 0
        self.vm = spte.VM(platform, policy, vcpus=vcpus, manual=manual, ring_bytes=16 * 2048 if mode == "ring" else 0)
        self.memory = spte.Backing(kind, npages * PAGE, populate=populate)
        self.taken = [0] * vcpus
        self.set_flags(0)

    def set_flags(self, flags):
        self.vm.set_memory_region(0, self.base * PAGE, self.npages * PAGE, self.memory, flags=flags)

    def write(self, pages, v=0):
        self._run(self.vm.vcpus[v].write, pages, v)

    def read(self, pages, v=0):
        self._run(self.vm.vcpus[v].read, pages, v)

    def _run(self, access, pages, v):
        gfns = np.asarray(list(pages), np.int64) + self.base
        while (stop := access(gfns)) is not None:
            assert stop.reason == "dirty_ring_full"
            gfns = gfns[stop.index :]
            self.pending = [*getattr(self, "pending", []), *self.take_ring()]
            self.vm.reset_dirty_rings()

    def take_ring(self):
        """Harvest all rings; returns page numbers in ring order, one ring after the other."""
        pages = []
        for v, vcpu in enumerate(self.vm.vcpus):
            ring = vcpu.ring
            while ring["flags"][at := self.taken[v] % len(ring)] == 1:
                pages.append(int(ring["offset"][at]))
                ring["flags"][at] = 3
                self.taken[v] += 1
        return pages

    def harvest(self):
        """Learn the dirty pages and re-arm them; returns a list, with repetitions only from a ring."""
        if self.mode == "ring":
            pages = [*self.__dict__.pop("pending", []), *self.take_ring()]
            self.vm.reset_dirty_rings()
            return pages
        bitmap = self.vm.get_dirty_log(0)
        if self.mode != "get":
            self.vm.clear_dirty_log(0, 0, self.npages, bitmap)
        return sorted(pages_of(bitmap))

    def stats(self, key, of="vcpu0"):
        return self.vm.stats()[of][key]

    def leafs(self):
        """{(level, first gfn): flags} of every leaf."""
        step = {1: 1, 2: 512, 3: 512 * 512}
        return {(lv, g + i * step[lv]): int(flags, 16) for lv, g, n, flags in self.vm.leafs() for i in range(n)}


def typical_run(platform, policy):
    """Reach every kernel: each way to log, split, harvest and collapse, NX pages, holes, rings, the public kernels."""
    from spte import kernels, mm

    for mode in ("get", "manual 1", "manual 3", *["ring"] * has_rings(policy)):
        for eager in (True, False):
            guest = Guest(platform, policy, mode=mode, kind="thp", npages=1100, vcpus=2)
            guest.vm.set_param("eager_page_split", eager)
            guest.write(range(0, 1100, 3))
            guest.set_flags(LOG)
            guest.write(range(700), v=1)
            guest.read(range(1100))
            guest.harvest()
            guest.set_flags(0)
            guest.vm.set_param("nx_huge_pages", True)
            guest.vm.vcpus[0].exec(np.arange(guest.base, guest.base + 4))
            guest.vm.vcpus[0].read([1])
            guest.vm.check()
            if guest.vm.check_extension(PRE_FAULT_MEMORY):
                guest.vm.vcpus[0].prefault(guest.base * PAGE, 8 * PAGE)
            guest.vm.kernel_write(guest.base + 3)
            mm.madvise(guest.memory, 0, 8)
            mm.madvise(guest.memory, 512, 8, mm.PAGEOUT, ages=True)
            guest.vm.set_memory_region(0, 0, 0)
            guest.vm.close()
    typical_shared_run(platform, policy)
    typical_nested_run(platform, policy)
    words = np.zeros(8, np.uint64)
    kernels.write_protect(words)
    kernels.clear_dirty(words)
    kernels.harvest(words, words[:1].copy())
    kernels.pml_flush(np.zeros(512, np.uint64), 511, words)
    kernels.split(words, np.zeros((1, 512), np.uint64))
    kernels.collapse(words, np.zeros((1, 512), np.uint64))


def typical_shared_run(platform, policy):
    """What runs only once threads have met."""
    for mode in ("get", "manual 1", *["ring"] * has_rings(policy)):
        guest = Guest(platform, policy, mode=mode, kind="thp", npages=1100, vcpus=2)
        guest.vm.exclusive.meet()
        guest.set_flags(LOG)
        for v in range(2):
            guest.write(range(700), v=v)
            guest.read(range(1100), v=v)
            guest.harvest()
        guest.set_flags(0)
        guest.vm.close()


def typical_nested_run(platform, policy):
    """A guest that runs guests, or has its paging on: aliases, small and large pages, tables that change, logging, zaps."""
    from programs.nest import Nest

    from spte import mm

    for mode, level in (("get", 1), ("manual 3", 2), *[("ring", 1)] * has_rings(policy)):
        nest = Nest(platform, policy, mode=mode, kind="thp", level=level, views=2, vcpus=2)
        address, entry, _ = nest.entry(0)
        for flags in (0, LOG, 0):
            nest.set_flags(flags)
            for v in range(2):
                nest.enter(v)
                nest.write_as_l2(range(0, 1024, 3), v)
                nest.read_as_l2(range(8), v, view=1)
            if flags:
                nest.harvest()
            for v in range(2):
                nest.leave(v)
                nest.vm.vcpus[v].store(address, nest.tables.unused(entry, accessed=False))
                nest.vm.vcpus[v].invept()
            nest.vm.check()
        mm.madvise(nest.memory, 0, 8, mm.PAGEOUT, ages=True)
        nest.vm.close()
