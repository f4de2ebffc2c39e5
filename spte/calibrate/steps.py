"""Timed steps on the host's KVM: each begins from a fresh memslot, and gives a cost per item in nanoseconds, fixed parts taken out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.devkvm.device import HostMemory, HostVm
from spte.devkvm.guest import EXIT_ROUTINE
from spte.devkvm.host import Host
from spte.devkvm.machine import HostMachine
from spte.platform import PAGE_SIZE
from spte.profile.rings import DIRTY, HARVESTED
from spte.replay.guest import HALT, Exits, UnsupportedOp
from spte.replay.payload import Command
from spte.trace import PAGES_PER_2M

PAGES = 16384  # of the slot whose pages are written: 64 MiB
WORDS = PAGES // 64
LARGE_WORDS = 1 << 15  # of the bitmap of a slot that nobody touches: 8 GiB
BASE, ABOVE = 1 << 18, 1 << 20  # gfns where slots begin: those that the guest writes, and beyond what it reaches
EXITS = 10_000
SLOT = 0


def _ns(call: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


class Bench:
    """A VM of the host's KVM with one slot, whose steps are timed.

    Parameters
    ----------
    host : Host
        What stands for the host in the model.
    kvm : int
        Descriptor of /dev/kvm.
    ring_bytes : int
        Dirty ring of its vCPU; 0 = bitmaps.
    """

    def __init__(self, host: Host, kvm: int, ring_bytes: int = 0) -> None:
        self._machine = HostMachine(host, kvm)
        self._machine.open(1, ring_bytes)
        self._machine.load_payload("flat", small_pages=False, used=True)
        self._vm: HostVm = self._machine.vm

    def close(self) -> None:
        """Destroy the VM."""
        self._machine.close()

    @contextmanager
    def slot(self, memory: HostMemory, flags: int, base: int = BASE) -> Iterator[None]:
        """Map `memory` at gfn `base` as the VM's one slot."""
        self._memory, self._base = memory, base
        self.set_flags(flags)
        try:
            yield
        finally:
            self._vm.set_memory_region(SLOT, 0, 0)

    def set_flags(self, flags: int) -> int:
        """Give the slot these flags; returns ns."""
        return _ns(lambda: self._vm.set_memory_region(SLOT, self._base * PAGE_SIZE, self._memory.size, self._memory, flags=flags))

    def get(self) -> int:
        """KVM_GET_DIRTY_LOG; returns ns."""
        words = np.zeros(self._memory.size // PAGE_SIZE // 64 + 1, np.uint64)
        return _ns(lambda: self._vm.get_dirty_log_into(SLOT, words))

    def clear(self) -> int:
        """KVM_CLEAR_DIRTY_LOG of all pages of the slot; returns ns."""
        pages = self._memory.size // PAGE_SIZE
        bits = np.full(pages // 64, ~np.uint64(0))
        return _ns(lambda: self._vm.clear_dirty_log(SLOT, 0, pages, bits))

    def run(self, routine: str, pages: int, step: int = 1) -> int:
        """Let the guest call `routine` for each `step`-th of `pages`; returns ns. UnsupportedOp if it does not come to the end."""
        count = 1 if step > 1 else pages
        commands = [Command(routine, BASE + page, count, 0) for page in range(0, pages, step if step > 1 else pages)]
        exits: list[Exits] = []
        taken = _ns(lambda: exits.append(self._machine.guest.start(0, commands)))
        if exits != [[HALT]]:
            raise UnsupportedOp(f"the guest ended with {exits[0]}")
        return taken

    def write(self, step: int = 1) -> int:
        """Let the guest write each `step`-th page of the slot; returns ns."""
        return self.run("guest_write", PAGES, step)

    def reap(self) -> None:
        """Take all entries of the ring, and reset them."""
        ring = self._vm.vcpus[0].ring
        ring["flags"][ring["flags"] == DIRTY] = HARVESTED
        del ring
        self._vm.reset_dirty_rings()


def exit_ns(bench: Bench, memory: HostMemory) -> float:
    """Return what an exit and an entry take: the guest's CPUID, which KVM handles."""
    with bench.slot(memory, 0):
        bench.run("guest_read", EXITS)
        return max(0, bench.run(EXIT_ROUTINE, EXITS) - bench.run("guest_read", EXITS)) / EXITS


def logging_ns(bench: Bench, memory: HostMemory) -> dict[str, float]:
    """Return what logging costs by bitmap.

    `first`: a page written that has no SPTE; `armed`: one that is write-protected, or clean; both with their exit.
    `dense`, `sparse`: GET for each word of 64 pages that are dirty, and one of which is; without what a clean word takes. `cleared`: CLEAR
    for each word of 64 pages that are dirty.
    """
    with bench.slot(memory, LOG_DIRTY_PAGES):
        first, again = bench.write(), bench.write()
        clean = bench.get(), bench.get()
        armed = bench.write()
        dense = bench.get()
        bench.write(step=64)
        sparse = bench.get()
        untouched = bench.clear()
        bench.write()
        cleared = bench.clear()
    per_word = [max(0, taken - clean[1]) / WORDS for taken in (dense, sparse)]
    return {
        "first": max(0, first - again) / PAGES, "armed": max(0, armed - again) / PAGES, "dense": per_word[0], "sparse": per_word[1],
        "cleared": max(0, cleared - untouched) / WORDS,
    }  # fmt: skip


def words_ns(bench: Bench, large: HostMemory, small: HostMemory) -> dict[str, float]:
    """Return what a clean word of 64 pages takes when logging is enabled, and in GET."""
    taken = {}
    for name, memory in (("large", large), ("small", small)):
        with bench.slot(memory, 0, ABOVE):
            enabled = bench.set_flags(LOG_DIRTY_PAGES)
            bench.get()
            taken[name] = enabled, bench.get()
    words = LARGE_WORDS - small.size // PAGE_SIZE // 64
    return {
        "enable": max(0, taken["large"][0] - taken["small"][0]) / words, "get": max(0, taken["large"][1] - taken["small"][1]) / words,
    }  # fmt: skip


def enable_ns(bench: Bench, memory: HostMemory) -> float:
    """Return what enabling takes for each page that is mapped writable."""
    with bench.slot(memory, 0):
        empty = bench.set_flags(LOG_DIRTY_PAGES)
        bench.set_flags(0)
        bench.write()
        return max(0, bench.set_flags(LOG_DIRTY_PAGES) - empty) / PAGES


def disable_ns(bench: Bench, huge: HostMemory) -> float:
    """Return what disabling takes for each 2 MiB of transparent huge pages that logging has mapped by 4 KiB."""
    with bench.slot(huge, LOG_DIRTY_PAGES):
        empty = bench.set_flags(0)
        bench.set_flags(LOG_DIRTY_PAGES)
        bench.write()
        return max(0, bench.set_flags(0) - empty) / (PAGES // PAGES_PER_2M)


def ring_ns(bench: Bench, memory: HostMemory) -> float:
    """Return what a write to an armed page takes in a VM with a ring, its exit included."""
    with bench.slot(memory, LOG_DIRTY_PAGES):
        bench.write()
        again = bench.write()
        bench.reap()
        armed = bench.write()
        bench.reap()
        return max(0, armed - again) / PAGES
