"""Warm-up: compile every kernel, or load it from the cache, by running a small VM through each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from spte import kernels, mm
from spte.guest_tables import GuestTables
from spte.host.backing import Backing
from spte.host.pages import the_host
from spte.mmu.memslot import max_mapping_level
from spte.policy import Policy
from spte.vm.vm import VM

_SLOT = 508  # a large one that every version has


def warmup(progress: Callable[[str], None] | None = None, *, steps: Iterable[str] | None = None) -> None:
    """Compile every kernel; quick if the cache has them.

    Parameters
    ----------
    progress : callable, optional
        Called with the name of each step before it begins.
    steps : iterable of str, optional
        Names from `STEPS`; only these are compiled. Default: all.
    """
    for name in STEPS if steps is None else steps:
        if progress is not None:
            progress(name)
        STEPS[name]()


def steps_of(policies: Iterable[Policy], *, rings: bool = False, threads: bool = False) -> list[str]:
    """Return the names of the steps that VMs need which log dirty pages: into rings, with vCPUs on threads."""
    old = any(policy.collapse == "zap-leaf" for policy in policies)
    return ["guest access", "logging"] + ["rings"] * rings + ["threads"] * threads + ["old policies"] * old


def _access() -> None:
    with VM("ept-pml") as vm:
        backing = Backing("4k", 4 << 20)
        vm.set_memory_region(_SLOT, 0, 4 << 20, backing)
        vm.vcpus[0].read(np.arange(8))
        vm.vcpus[0].write(np.arange(4))


def _memory() -> None:
    with VM("ept-pml") as vm:
        backing = Backing("4k", 4 << 20)
        vm.set_memory_region(_SLOT, 0, 4 << 20, backing)
        vm.vcpus[0].write(np.arange(4))
        vm.vcpus[0].prefault(8 << 12, 4096)
        mm.madvise(backing, 0, 4, mm.PAGEOUT, ages=True)
        vm.kernel_write(0)
        max_mapping_level(vm.memslots.spaces[0], the_host(), 0, np.int64(0), np.int64(1))
        vm.check()


def _logging() -> None:
    with VM("ept-pml", manual=1) as vm:
        backing = Backing("thp", 4 << 20, populate=True)
        vm.set_memory_region(_SLOT, 0, 4 << 20, backing)
        for flags in (1, 0):
            vm.vcpus[0].write(np.arange(1024))
            vm.set_memory_region(_SLOT, 0, 4 << 20, backing, flags=flags)
            if flags:
                vm.vcpus[0].write(np.arange(8))
                vm.clear_dirty_log(_SLOT, 0, 1024, vm.get_dirty_log(_SLOT))
                vm.enable_cap("manual_dirty_log_protect2", 0)
                vm.get_dirty_log(_SLOT)


def _old() -> None:
    """Reach what only old policies do: recover huge pages leaf by leaf, set D at the end, drop tables with what the host takes back."""
    with VM("ept-pml", "5.11") as vm:
        backing = Backing("thp", 4 << 20, populate=True)
        for flags in (0, 1, 0):
            vm.set_memory_region(_SLOT, 0, 4 << 20, backing, flags=flags)
            vm.vcpus[0].write(np.arange(8))
        mm.madvise(backing, 0, 512, mm.DONTNEED)


def _rings() -> None:
    with VM("npt", ring_bytes=4096) as vm:
        vm.set_memory_region(_SLOT, 0, 4 << 20, Backing("4k", 4 << 20, populate=True), flags=1)
        vm.vcpus[0].write(np.arange(8))
        vm.vcpus[0].ring["flags"][:8] |= 2
        vm.reset_dirty_rings()


def _threads() -> None:
    """Reach what runs only once threads have met."""
    for ring_bytes in (0, 1 << 14):
        with VM("ept-pml", manual=1, ring_bytes=ring_bytes) as vm:
            vm.set_memory_region(_SLOT, 0, 4 << 20, Backing("4k", 4 << 20), flags=1)
            vm.exclusive.meet()
            vm.vcpus[0].write(np.arange(1024))
            if ring_bytes:
                vm.reset_dirty_rings()
                continue
            vm.clear_dirty_log(_SLOT, 0, 1024, vm.get_dirty_log(_SLOT))
            vm.enable_cap("manual_dirty_log_protect2", 0)
            vm.get_dirty_log(_SLOT)


def _shadow() -> None:
    with VM("npt-rmap", "6.1") as vm:
        backing = Backing("thp", 4 << 20, populate=True)
        vm.set_memory_region(_SLOT, 0, 4 << 20, backing)
        for flags in (0, 1, 0):
            vm.set_memory_region(_SLOT, 0, 4 << 20, backing, flags=flags)
            vm.vcpus[0].write(np.arange(8))
        mm.madvise(backing, 0, 4, mm.PAGEOUT, ages=True)
    with VM("shadow") as vm:
        for size in (4 << 20, 0, 4 << 20):  # the root's pages go with the slot, and new ones as the guest turns paging on
            vm.set_memory_region(_SLOT, 0, size, backing if size else None)
            if size:
                vm.vcpus[0].write([1])
        vm.vcpus[0].load_cr3(0)


def _nested() -> None:
    """Run L2 over small and large pages of L1's EPT, with aliases; L1 changes its tables; every kind of work on such leaves."""
    with VM("ept-pml") as vm:
        memory, backing = Backing("4k", 16 << 12), Backing("thp", 4 << 20, populate=True)
        vm.set_memory_region(_SLOT, 0, 4 << 20, backing)
        vm.set_memory_region(0, 4 << 20, 16 << 12, memory)
        tables = GuestTables(memory, 4 << 20)
        tables.map(0, 0, 2, level=2)
        tables.map(1024, 0, 8)
        vcpu, (address, entry, _) = vm.vcpus[0], tables.entry(1024)
        for flags in (0, 1, 0):
            vm.set_memory_region(_SLOT, 0, 4 << 20, backing, flags=flags)
            vcpu.enter_l2(tables.address())
            vcpu.write([1, 1024])
            vm.leafs()
            vcpu.leave_l2()
            vcpu.store(address, tables.unused(entry, accessed=False))
            vcpu.invept()
        mm.madvise(backing, 0, 4, mm.PAGEOUT, ages=True)
        vm.check()


def _plain() -> None:
    leaves = np.zeros(512, np.uint64)
    table = np.zeros((1, 512), np.uint64)
    bitmap = np.zeros(8, np.uint64)
    kernels.write_protect(leaves)
    kernels.clear_dirty(leaves)
    kernels.harvest(leaves, bitmap)
    kernels.pml_flush(leaves, 511, bitmap)
    kernels.split(leaves, table)
    kernels.collapse(leaves, table)


STEPS: dict[str, Callable[[], None]] = {
    "guest access": _access, "logging": _logging, "host memory": _memory, "old policies": _old, "shadow MMU": _shadow, "rings": _rings,
    "threads": _threads, "nested guests": _nested, "plain arrays": _plain,
}  # fmt: skip
