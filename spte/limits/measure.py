"""Guests to measure kernels on, and how: minimum of rounds, kernel and limit alternate, both with cold caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from spte.access import WRITE
from spte.arrays import reserve as memory
from spte.arrays.records import I64s, U64s
from spte.arrays.slots import Slots
from spte.bits import WRITABLE
from spte.cpu.run import run, run_shadow
from spte.host.backing import Backing
from spte.host.pages import the_host
from spte.limits.bare_loops import set_bits
from spte.platform import PAGE_SIZE, Platform
from spte.vm.vm import VM

BATCH = 1 << 23  # gfns of one batch: 64 MiB
FRESH_ROWS = 8  # upper tables beyond one in 512
_WRITE = np.array([WRITE], np.uint8)


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """One kernel and its limit on the same memory.

    Parameters
    ----------
    name, unit, limit : str
        What the kernel does, what is counted, what the limit does.
    units : int
        Units of one call of `work`; `limit_units` of `limit_work` (0: the same).
    work, limit_work : callable
        The kernel; the bare loop.
    setup, limit_setup : callable
        Refill before each round, not timed.
    at_most : float, optional
        The ratio to keep; None: only printed.
    why : str
        Why a ratio above `at_most` is the best that is known; printed where it is missed.
    """

    name: str
    unit: str
    units: int
    work: Callable[[], Any]
    limit: str
    limit_work: Callable[[], Any]
    at_most: float | None = None
    setup: Callable[[], Any] = nothing
    limit_setup: Callable[[], Any] = nothing
    limit_units: int = 0
    why: str = ""


@dataclass(frozen=True)
class Ratio:
    """What was measured of a `Case`: ns a unit of kernel and limit, their ratio and the bar."""

    name: str
    unit: str
    ns: float
    limit: str
    limit_ns: float
    at_most: float | None

    @property
    def ratio(self) -> float:
        """Kernel over limit."""
        return self.ns / self.limit_ns

    @property
    def met(self) -> bool | None:
        """The ratio is within its bar; None if it has none."""
        return None if self.at_most is None else self.ratio <= self.at_most


def seconds(work: Callable[[], Any]) -> float:
    """Return how long one call takes, s."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def limit_seconds(case: Case, rounds: int) -> float:
    """Return the least time of the limit in `rounds` rounds, s."""
    best = float("inf")
    for _ in range(rounds):
        case.limit_setup()
        best = min(best, seconds(case.limit_work))
    return best


def ratio_of(case: Case, kernel_s: float, limit_s: float) -> Ratio:
    """Return the ratio of two least times, s."""
    limit_units = case.limit_units or case.units
    return Ratio(case.name, case.unit, kernel_s / case.units * 1e9, case.limit, limit_s / limit_units * 1e9, case.at_most)


def measure(case: Case, rounds: int = 5) -> Ratio:
    """Measure kernel and limit by turns; the first calls, which may compile, do not count."""
    case.setup()
    case.work()
    case.limit_setup()
    case.limit_work()
    kernel_s = limit_s = float("inf")
    for _ in range(rounds):
        case.setup()
        kernel_s = min(kernel_s, seconds(case.work))
        limit_s = min(limit_s, limit_seconds(case, 1))
    return ratio_of(case, kernel_s, limit_s)


class Guest:
    """A VM with one slot, its arena touched beforehand, and plain arrays of the same sizes for the limits.

    Parameters
    ----------
    pages : int
        4 KiB pages, a multiple of 512.
    platform : str or Platform
        As `spte.VM` takes it.
    policy : str
        As `spte.VM` takes it.
    backing : str
        As `spte.Backing` takes it; populated.
    """

    def __init__(self, pages: int, platform: str | Platform = "ept-pml", policy: str = "6.12", backing: str = "4k") -> None:
        self.pages = pages
        self.vm = VM(platform, policy)
        self.memory = Backing(backing, pages * PAGE_SIZE, populate=True)
        self.tables = self.vm.mmu.tables
        self.tables.sptes[: pages // 512 + pages // 512**2 + FRESH_ROWS] = 0
        self.words: U64s = np.zeros(pages // 64, np.uint64)
        self.out: U64s = np.zeros(pages // 64, np.uint64)
        self.set_flags(0)

    @cached_property
    def flat(self) -> U64s:
        """The limits' array, touched beforehand."""
        array: U64s = memory.reserve(np.uint64, self.pages, huge=True)
        array[:] = ~np.uint64(0)
        return array

    def set_flags(self, flags: int) -> None:
        """Create the slot, or change its flags."""
        self.vm.set_memory_region(0, 0, self.pages * PAGE_SIZE, self.memory, flags=flags)

    def renew(self) -> None:
        """Create the slot again: nothing is mapped, the rows of the arena are free."""
        self.vm.set_memory_region(0, 0, 0)
        self.set_flags(0)

    def populate(self) -> None:
        """Write every page once, ascending."""
        for start in range(0, self.pages, BATCH):
            self.write(np.arange(start, min(start + BATCH, self.pages)))

    def write(self, gfns: I64s) -> None:
        """Let the guest write: only the kernel, in one run."""
        vcpu, mmu = self.vm.vcpus[0], self.vm.mmu
        vcpu.enter_guest()
        kernel = run_shadow if mmu.has_shadow_pages else run
        done = kernel(self.tables, self.vm.memslots.spaces[0], the_host(), vcpu.arrays, vcpu.mmu.mode, gfns, _WRITE, 0)
        assert done == len(gfns), f"access {done} of {len(gfns)} stopped"

    def slot(self) -> tuple[Slots, int, U64s, I64s]:
        """Return the kernels' table of slots, the slot's index in it, its bitmap, and the roots."""
        slot = self.vm.memslots.find(0)
        assert slot is not None
        s, k = self.vm.memslots.row_of(slot)
        return s, k, self.vm.memslots.bitmap(slot), self.vm.mmu.roots(0)

    def dirty_bit(self) -> np.uint64:
        """Return the bit that hardware sets at a write."""
        return np.uint64(1) << self.vm.mmu.mode[0].lay.dirty_shift

    def set_all(self) -> None:
        """Set W and D in every leaf, so that the next pass finds its work; the caches then hold the end of the tables."""
        set_bits(self.tables, WRITABLE | self.dirty_bit())

    def set_flat(self) -> None:
        """Do the same to the limits' array."""
        np.bitwise_or(self.flat, np.uint64(0xFFFF), out=self.flat)
