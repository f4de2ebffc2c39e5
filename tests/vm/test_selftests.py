"""The kernel's own KVM selftests as scenarios, each under its name, with sizes that run in seconds."""

import errno
import random

import numpy as np
import pytest
from conftest import LOG, PAGE, PLATFORMS, TDP_PLATFORMS, bitmap_of, pages_of

import spte
from spte._numba import jit as _jit
from spte.bits import PFN_MASK
from spte.mmu.walk import walk
from spte.profile import run as profile
from spte.profile.perf_test import PerfTest

READONLY, MANUAL = 2, 3
MIB, GIB = 1 << 20, 1 << 30
HUGE = 2 * MIB
SLOTS = 32764  # KVM_CAP_NR_MEMSLOTS


@pytest.fixture(params=[name for name in PLATFORMS if name != "shadow"])
def platform(request):
    """A selftest's guest has its paging on, which the platform `shadow` does not know."""
    return request.param


def small_in_plain_python(compiled, plain):
    return plain if _jit.PLAIN else compiled


def touch(vcpu, gfns, kind=spte.WRITE):
    """Access every gfn; the guest must run through."""
    access = vcpu.write if kind == spte.WRITE else vcpu.read
    assert access(gfns) is None


def host_page(vm, gfn):
    """Host page that the vCPU's tables map `gfn` to."""
    t = vm.mmu.tables
    row, i, level = walk(t, vm.vcpus[0].arrays.vcpu[0].root, np.int64(gfn))
    return (int(t.sptes[row, i] & PFN_MASK) >> 12) + gfn % (1 << (9 * (level - 1)))


def slot_of(vm, sid, gpa, backing, flags=0, **more):
    vm.set_memory_region(sid, gpa, more.pop("size", backing.size), backing, flags=flags, **more)


# -- dirty_log_test -------------------------------------------------------------------------------------------------------


class DirtyLogTest:
    """The selftest's guest and host: a value a page, the host's rules for each."""

    def __init__(self, platform, policy, mode, npages):
        self.mode, self.npages, self.rng = mode, npages, np.random.default_rng(0)
        ring_entries = min(65536, 1 << npages.bit_length() - 1)
        self.vm = spte.VM(platform, policy, manual=MANUAL * (mode == "clear-log"), ring_bytes=16 * ring_entries * (mode == "dirty-ring"))
        self.base = (1 << self.vm.platform.gpa_bits - 12) - npages  # the top of guest memory: an odd gfn
        slot_of(self.vm, 1, self.base * PAGE, spte.Backing("4k", npages * PAGE), LOG)
        self.value = np.zeros(npages, np.int64)
        self.todo = np.arange(npages)  # once, every page in order
        self.iteration, self.min_iter, self.last, self.fetched = 1, 1, -1, 0
        self.track, self.full = set(), False

    def guest(self, writes):
        """Let the guest write the current iteration to so many pages; a full ring stops it until the next harvest."""
        while writes > 0 and not self.full:
            if not len(self.todo):
                self.todo = self.rng.integers(0, self.npages, 1024)
            part = self.todo[:writes]
            stop = self.vm.vcpus[0].write(part + self.base)
            self.full = stop is not None
            assert not self.full or (stop.reason, self.mode) == ("dirty_ring_full", "dirty-ring")
            done = stop.index if self.full else len(part)
            self.value[part[:done]] = self.iteration
            self.todo = self.todo[done:]
            writes -= done

    def collect(self):
        self.full = False
        if self.mode == "dirty-ring":
            return self.collect_ring()
        bitmap = self.vm.get_dirty_log(1)
        if self.mode == "clear-log":
            self.vm.clear_dirty_log(1, 0, self.npages, bitmap)
        return pages_of(bitmap)

    def collect_ring(self):
        ring, pages = self.vm.vcpus[0].ring, []
        while ring["flags"][at := (self.fetched + len(pages)) % len(ring)] == 1:
            assert ring["slot"][at] == 1
            pages.append(int(ring["offset"][at]))
            ring["flags"][at] = 3
        assert max(pages, default=0) < self.npages
        assert self.vm.reset_dirty_rings() == len(pages)
        self.fetched += len(pages)
        self.last = pages[-1] if pages else self.last
        return set(pages)

    def verify(self, reported):
        k = self.iteration
        assert self.track <= reported
        self.track = set()
        assert (self.value <= k).all()
        for page in reported:
            v = self.value[page]
            if v in (k, k - 1):
                continue
            assert self.mode == "dirty-ring", (page, v, k)
            if v == k - 2 and self.min_iter <= k - 2:
                self.min_iter = k - 1  # the last page before the ring was full, once in an iteration
            else:
                assert page == self.last, (page, v, k)
        self.track = set(np.flatnonzero(self.value == k).tolist()) - reported


@pytest.mark.parametrize("mode", ["dirty-log", "clear-log", "dirty-ring"])
def test_dirty_log_test(platform, policy, mode):
    test = DirtyLogTest(platform, policy, mode, npages=small_in_plain_python((1 << 14) + 3, (1 << 10) + 3))
    dirty = clear = track_next = 0
    for _ in range(small_in_plain_python(32, 6)):
        test.guest(int(test.rng.integers(0, test.npages)))
        reported = test.collect()
        test.guest(len(test.todo))  # up to the next sync, where the host stops it
        test.verify(reported)
        test.iteration += 1
        test.vm.check()
        dirty, clear, track_next = dirty + len(reported), clear + test.npages - len(reported), track_next + len(test.track)
    assert min(dirty, clear, track_next) > 0


# -- dirty_log_perf_test --------------------------------------------------------------------------------------------------

SOURCE, BYTES = small_in_plain_python(("anonymous_hugetlb_1gb", GIB), ("anonymous_hugetlb_2mb", 2 * HUGE))
PAGES, SPLITS_2M, SPLITS_1G = BYTES // PAGE, BYTES // HUGE, BYTES // GIB
SPLIT_SPTES = (SPLITS_2M + SPLITS_1G) * 513


def perf_test(policy, **options):
    row = profile.profile(PerfTest(source=SOURCE, bytes_per_vcpu=BYTES, **options), ["ept-pml"], [policy])[0]
    assert row.lost == 0
    return {(p.kind, p.iteration): p.counts for p in row.phases}


def faults(counts):
    return counts["faults_fast"] + counts["faults_slow"]


def splits(counts):
    return counts["splits_1g"], counts["splits_2m"]


def test_dirty_log_perf_test_initially_set():
    phases = perf_test("6.12")
    assert phases["enable", 0]["sptes_written"] == phases["enable", 0]["flushes"] == 0
    assert faults(phases["dirty", 1]) == phases["dirty", 1]["pml_entries"] == 0
    assert splits(phases["clear", 1]) == (SPLITS_1G, SPLITS_2M)
    assert phases["clear", 1]["sptes_written"] == SPLIT_SPTES + PAGES
    assert faults(phases["dirty", 2]) == 0
    assert (phases["dirty", 2]["pml_entries"], phases["dirty", 2]["pml_full"]) == (PAGES, PAGES // 512 - 1)
    assert phases["clear", 2]["sptes_written"] == PAGES


def test_dirty_log_perf_test_without_manual_protect():
    phases = perf_test("6.12", no_manual_protect=True)
    assert splits(phases["enable", 0]) == (SPLITS_1G, SPLITS_2M)
    assert phases["enable", 0]["sptes_written"] == SPLIT_SPTES + PAGES
    for i in (1, 2):
        assert faults(phases["dirty", i]) == 0
        assert phases["dirty", i]["pml_entries"] == phases["get", i]["sptes_written"] == PAGES
        assert ("clear", i) not in phases


def test_dirty_log_perf_test_without_eager_page_split():
    phases = perf_test("6.12,eager_page_split=N")
    assert phases["clear", 1]["sptes_written"] == (SPLITS_1G or SPLITS_2M)  # the largest leaves lose W
    assert splits(phases["clear", 1]) == (0, 0)
    assert splits(phases["dirty", 2]) == (SPLITS_1G, SPLITS_2M)
    assert (phases["dirty", 2]["faults_slow"], phases["dirty", 2]["faults_fast"]) == (PAGES, 0)


# -- dirty_log_page_splitting_test ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [0, MANUAL])
@pytest.mark.parametrize("version", ["6.1", "6.12", "6.13"])
@pytest.mark.parametrize("kind", small_in_plain_python(["hugetlb2m", "hugetlb1g"], ["hugetlb2m"]))
def test_dirty_log_page_splitting_test(platform_that_splits_in_place, version, kind, manual):
    size = GIB if kind == "hugetlb1g" else small_in_plain_python(32 * MIB, HUGE)
    total = 2 * size // PAGE
    vm = spte.VM(platform_that_splits_in_place, version, vcpus=2, manual=manual)
    memory = [spte.Backing(kind, size) for _ in range(2)]

    def set_flags(flags):
        for sid, backing in enumerate(memory):
            slot_of(vm, sid, sid * size, backing, flags)

    def dirty():
        for v, vcpu in enumerate(vm.vcpus):
            touch(vcpu, np.arange(v * total // 2, (v + 1) * total // 2))

    def pages():
        stats = vm.stats()["vm"]
        return stats["pages_4k"], stats["pages_2m"], stats["pages_1g"]

    def huge_pages():
        return pages()[1] * 512 + pages()[2] * 512 * 512

    set_flags(0)
    dirty()
    populated = pages()
    assert huge_pages() == total
    set_flags(LOG)
    assert huge_pages() == (total if manual else 0)
    for _ in range(2):
        dirty()
        for sid in range(2):
            bitmap = vm.get_dirty_log(sid)
            if manual:
                vm.clear_dirty_log(sid, 0, total // 2, bitmap)
        assert huge_pages() == 0
        assert pages()[0] >= total
    set_flags(0)
    if version == "6.13":
        assert pages() == populated
    dirty()
    assert pages() == populated
    vm.check()


# -- kvm_page_table_test --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", small_in_plain_python(["4k", "thp", "hugetlb2m", "hugetlb1g"], ["4k", "thp"]))
def test_kvm_page_table_test(platform, policy, kind, eager):
    size = GIB if kind == "hugetlb1g" else small_in_plain_python(32 * MIB, 2 * HUGE)
    large = {"4k": PAGE, "hugetlb1g": GIB}.get(kind, HUGE) // PAGE  # pages of one large page
    gfns = np.arange(size // PAGE)
    vm = spte.VM(platform, policy, vcpus=4)
    vm.set_param("eager_page_split", eager)
    memory = spte.Backing(kind, size)
    slot_of(vm, 0, 0, memory)
    level = {1: "pages_4k", 512: "pages_2m", 512 * 512: "pages_1g"}[large]
    by_id = (spte.WRITE, spte.READ, spte.WRITE, spte.READ)

    for vcpu, kind_of_access in zip(vm.vcpus, by_id, strict=True):  # KVM_CREATE_MAPPINGS
        touch(vcpu, gfns[::large], kind_of_access)
    assert vm.stats()["vm"][level] == size // PAGE // large
    slot_of(vm, 0, 0, memory, LOG)
    before = faults(vm.counters())
    for vcpu, kind_of_access in zip(vm.vcpus, by_id, strict=True):  # KVM_UPDATE_MAPPINGS
        if large == 1:
            touch(vcpu, gfns, kind_of_access)
        else:
            touch(vcpu, gfns[::large])
            touch(vcpu, gfns.reshape(-1, large)[:, large // 2 :].reshape(-1), spte.READ)
    assert pages_of(vm.get_dirty_log(0)) >= set(gfns[::large].tolist())
    if large == 512 and platform in TDP_PLATFORMS:
        assert vm.stats()["vm"]["pages_2m"] == 0
        writes = 0 if eager and "pml" in platform.split("-") else size // HUGE
        reads = 0 if eager or policy != "6.1" else size // PAGE // 2
        assert faults(vm.counters()) - before == writes + reads
    slot_of(vm, 0, 0, memory)
    for vcpu in vm.vcpus:  # KVM_ADJUST_MAPPINGS
        touch(vcpu, gfns, spte.READ)
    assert vm.stats()["vm"][level] == size // PAGE // large
    vm.check()


# -- memslot_modification_stress_test -------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_memslot_modification_stress_test(platform, policy, overlap):
    npages, vcpus, base = small_in_plain_python(8192, 512), 2, 1 << 18
    vm = spte.VM(platform, policy, vcpus=vcpus)
    slot_of(vm, 0, base * PAGE, spte.Backing("4k", npages * PAGE, populate=True))
    dummy = spte.Backing("4k", PAGE)
    at_once = 8 if platform not in TDP_PLATFORMS and vm.platform.ad_bits else 1  # the rmap MMU maps neighbours with a page
    shares = [np.arange(base, base + npages)] * vcpus if overlap else np.split(np.arange(base, base + npages), vcpus)
    for vcpu, gfns in zip(vm.vcpus, shares, strict=True):
        touch(vcpu, gfns)
    for _ in range(10):
        before = faults(vm.counters())
        slot_of(vm, 7, (base - 1) * PAGE, dummy)
        for vcpu, gfns in zip(vm.vcpus, shares, strict=True):
            touch(vcpu, gfns)
        assert faults(vm.counters()) == before  # a new slot takes no mapping away
        vm.set_memory_region(7, 0, 0)
        assert vm.stats()["vm"]["pages_4k"] == 0  # but a deletion takes all: KVM_X86_QUIRK_SLOT_ZAP_ALL
        for vcpu, gfns in zip(vm.vcpus, shares, strict=True):
            touch(vcpu, gfns)
        assert faults(vm.counters()) == before + npages // at_once
        assert vm.stats()["vm"]["pages_4k"] == npages
        vm.check()


# -- memslot_perf_test ----------------------------------------------------------------------------------------------------


class HostMemory:
    """What the guest reads and writes by way of its tables: a value a host page."""

    def __init__(self, vm):
        self.vm, self.data = vm, {}

    def read(self, gfn):
        stop = self.vm.vcpus[0].read([gfn])
        assert stop is None or stop.reason == "mmio"
        return "mmio" if stop else self.data.get(host_page(self.vm, gfn), 0)

    def write(self, gfn, value):
        touch(self.vm.vcpus[0], [gfn])
        self.data[host_page(self.vm, gfn)] = value


@pytest.fixture
def guest_memory(platform, policy):
    return HostMemory(spte.VM(platform, policy))


def test_memslot_perf_test_move_active_area(guest_memory):
    vm, pages = guest_memory.vm, 16
    backing = spte.Backing("4k", pages * PAGE)
    for round_ in range(10):
        base = 512 + (round_ % 2) * pages
        slot_of(vm, 0, base * PAGE, backing)
        for p in range(pages):
            assert guest_memory.read(base + p) == (round_ and 100 * (round_ - 1) + p)
            guest_memory.write(base + p, 100 * round_ + p)
        assert guest_memory.read(512 + (1 - round_ % 2) * pages) == "mmio"
        vm.check()


def test_memslot_perf_test_map_and_unmap(guest_memory):
    """Many slots side by side in reverse host order; chunks of them are deleted and come back with their data."""
    vm, count, pages = guest_memory.vm, small_in_plain_python(1024, 64), 2
    backing = spte.Backing("4k", count * pages * PAGE)

    def add(sid):
        size = pages * PAGE
        slot_of(vm, sid, sid * size, backing, size=size, offset=(count - 1 - sid) * size)

    for sid in range(count):
        add(sid)
    for gfn in range(count * pages):
        guest_memory.write(gfn, gfn + 1)
    for first in range(0, count, count // 8):
        chunk = range(first, first + count // 16)
        for sid in chunk:
            vm.set_memory_region(sid, 0, 0)
        assert guest_memory.read(first * pages) == "mmio"
        for sid in chunk:
            add(sid)
        for gfn in range(first * pages, (first + count // 8) * pages, 5):
            assert guest_memory.read(gfn) == gfn + 1
    assert guest_memory.data == {backing.hpage + (count - 1 - g // pages) * pages + g % pages: g + 1 for g in range(count * pages)}
    vm.check()


def test_memslot_perf_test_rw(guest_memory):
    """Host and guest take turns; each reads what the other wrote."""
    vm, pages = guest_memory.vm, 64
    backing = spte.Backing("thp", HUGE)
    slot_of(vm, 0, 0, backing)
    for round_ in range(4):
        for p in range(pages):
            guest_memory.write(p, 2 * round_)
            assert guest_memory.data[backing.hpage + p] == 2 * round_
            guest_memory.data[backing.hpage + p] = 2 * round_ + 1
            backing.write(p, 1)
            assert guest_memory.read(p) == 2 * round_ + 1


# -- set_memory_region_test -----------------------------------------------------------------------------------------------


def refuses(call, code):
    with pytest.raises(spte.KvmError) as caught:
        call()
    assert caught.value.errno == code


def test_set_memory_region_test_flags(platform):
    vm, backing = spte.VM(platform), spte.Backing("4k", HUGE)
    for i in range(32):
        for flags in (1 << i, 1 << i | LOG, 1 << i | READONLY):
            if 1 << i & ~(LOG | READONLY):
                refuses(lambda flags=flags: slot_of(vm, 0, 0, backing, flags), errno.EINVAL)
    assert vm.slots() == []
    for flags in (0, LOG, READONLY, LOG | READONLY):
        slot_of(vm, flags, flags * HUGE, backing, flags)
    assert [slot["flags"] for slot in vm.slots()] == [0, LOG, READONLY, LOG | READONLY]


@pytest.mark.parametrize("kind", [spte.READ, spte.WRITE, spte.EXEC])
def test_set_memory_region_test_zero_slots(platform, kind):
    stop = spte.VM(platform).vcpus[0].run([0], [kind])
    assert (stop.index, stop.gfn, stop.kind) == (0, 0, kind)


def test_set_memory_region_test_max_slots():
    vm, backing = spte.VM(), spte.Backing("4k", SLOTS * HUGE)
    for sid in range(SLOTS):
        slot_of(vm, sid, sid * HUGE, backing, size=HUGE, offset=sid * HUGE)
    refuses(lambda: slot_of(vm, SLOTS, SLOTS * HUGE, backing, size=HUGE), errno.EINVAL)
    assert vm.check_extension(10) == len(vm.slots()) == 32764
    gfns = np.array(random.Random(0).sample(range(SLOTS * 512), 1000))
    touch(vm.vcpus[0], gfns)
    assert [host_page(vm, int(gfn)) for gfn in gfns] == (gfns + backing.hpage).tolist()


def test_set_memory_region_test_move(guest_memory):
    """One page down, guest and host addresses no longer fit a huge page: the stale translation must not be used."""
    vm, backing, base = guest_memory.vm, spte.Backing("thp", HUGE, populate=True), 0xC0000
    slot_of(vm, 10, base * PAGE, backing)
    guest_memory.data[backing.hpage] = 1
    assert guest_memory.read(base) == 1
    assert vm.stats()["vm"]["pages_2m"] == 1
    slot_of(vm, 10, (base - 1) * PAGE, backing)
    guest_memory.data[backing.hpage] = 2
    assert guest_memory.read(base) == 0  # page 1 of the host's memory
    assert guest_memory.read(base - 1) == 2
    assert vm.stats()["vm"]["pages_2m"] == 0
    guest_memory.data[backing.hpage] = 1
    slot_of(vm, 10, base * PAGE, backing)
    assert guest_memory.read(base) == 1
    assert guest_memory.read(base - 1) == "mmio"


def test_set_memory_region_test_delete_and_recreate(guest_memory):
    vm, base = guest_memory.vm, 0xC0000
    slot_of(vm, 10, base * PAGE, spte.Backing("4k", HUGE))
    guest_memory.write(base, 7)
    vm.set_memory_region(10, 0, 0)
    assert [guest_memory.read(base) for _ in range(3)] == ["mmio"] * 3
    stop = vm.vcpus[0].exec([base])
    assert (stop.index, stop.gfn) == (0, base)
    slot_of(vm, 10, base * PAGE, spte.Backing("4k", HUGE))
    assert guest_memory.read(base) == 0


def test_set_memory_region_test_overlap(platform):
    vm, backing = spte.VM(platform), spte.Backing("4k", 2 * HUGE)
    slot_of(vm, 10, 0, backing, size=HUGE)
    refuses(lambda: slot_of(vm, 11, PAGE, backing, size=HUGE), errno.EEXIST)
    refuses(lambda: vm.set_memory_region(10, 0, 2 * HUGE, backing), errno.EINVAL)
    refuses(lambda: vm.clear_dirty_log(10, 0, 512, bitmap_of([], 512)), errno.ENOENT)
