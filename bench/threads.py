"""What threads are worth: ``python -m bench.threads [--guest 4G] [PAGE.md]``, beside bare loops on as many threads in the same run.

A row is a rate over another, or a time over a limit's; each is the best of several rounds. A page gets the table between the marks it has.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import spte
from bench.conftest import guest_pages
from spte.arrays.records import I64s
from spte.bits import WRITABLE
from spte.limits.bare_loops import rearm_by_zeros, scatter_or, set_bits
from spte.mmu.slot.clear_dirty import clear_dirty_slot

PAGE, LOG, ROUNDS, WRITES = 4096, 1, 5, 1 << 22
SHORT, MANY = 1 << 19, 60  # writes and rounds where two threads want two cores at once, which others may use
MARK, END = "<!-- bench.threads -->", "<!-- end of bench.threads -->"


class Row(NamedTuple):
    """One figure."""

    work: str
    figure: float
    unit: str
    mark: float | None = None
    at_least: bool = True

    @property
    def cells(self) -> tuple[str, ...]:
        if self.mark is None:
            return self.work, f"{self.figure:.3g} {self.unit}", "", ""
        met = self.figure >= self.mark if self.at_least else self.figure <= self.mark
        bound = f"at {'least' if self.at_least else 'most'} {self.mark:.2f} {self.unit}"
        return self.work, f"{self.figure:.2f} {self.unit}", bound, "met" if met else "missed"


class Guest:
    """A guest of 4 KiB leaves that logs, of two vCPUs, each of which writes a half of it."""

    def __init__(self, pages: int) -> None:
        self.pages, self.half = pages, pages // 2
        self.vm = spte.VM("ept-pml", vcpus=2)
        self.memory = spte.Backing("4k", pages * PAGE, populate=True)
        self.vm.set_memory_region(0, 0, pages * PAGE, self.memory)
        self.vm.vcpus[0].write(np.arange(pages))
        self.vm.set_memory_region(0, 0, pages * PAGE, self.memory, flags=LOG)
        self.tables, self.mode = self.vm.mmu.tables, self.vm.mmu.mode
        self.dirty = np.uint64(1) << self.mode[0].lay.dirty_shift
        self.flat = np.full(pages, ~np.uint64(0))
        rng = np.random.default_rng(0)
        self.random = [rng.integers(0, self.half, WRITES) + v * self.half for v in range(2)]
        self.ascending = [np.tile(np.arange(self.half), max(WRITES // self.half, 1)) + v * self.half for v in range(2)]

    def share(self) -> None:
        """Let vCPUs run beside each other from now on."""
        self.vm.exclusive.meet()

    def set_all(self) -> None:
        """Set W and D everywhere, so that writes are hits."""
        set_bits(self.tables, WRITABLE | self.dirty)

    def clear_all(self) -> None:
        """Set W and clear D everywhere, so that PML logs each page's next write."""
        self.set_all()
        clear_dirty_slot(self.tables, self.mode, 0, 0, self.pages)

    def write(self, v: int, gfns: I64s) -> None:
        """Write from one vCPU."""
        assert self.vm.vcpus[v].write(gfns) is None


def best(work: Callable[[], object], setup: Callable[[], object] = lambda: None, rounds: int = ROUNDS) -> float:
    """Return the least time of `rounds`, s; the first call, which may compile, does not count."""
    least = float("inf")
    for n in range(rounds + 1):
        setup()
        start = time.perf_counter()
        work()
        if n:
            least = min(least, time.perf_counter() - start)
    return least


def together(pool: ThreadPoolExecutor, work: Callable[[int], object]) -> Callable[[], None]:
    """Return a call that does ``work(0)`` and ``work(1)`` on two threads."""

    def both() -> None:
        for each in [pool.submit(work, v) for v in range(2)]:
            each.result()

    return both


def scaling(guest: Guest, pool: ThreadPoolExecutor, batches: list[npt.NDArray[np.int64]]) -> tuple[float, float]:
    """Return how much faster two threads are than one, of vCPUs and of the bare loop."""
    guest.set_all()
    short = [batch[:SHORT] for batch in batches]
    one = best(lambda: guest.write(0, short[0]), rounds=MANY)
    two = best(together(pool, lambda v: guest.write(v, short[v])), rounds=MANY)
    bare_one = best(lambda: scatter_or(guest.flat, short[0], guest.dirty), rounds=MANY)
    bare_two = best(together(pool, lambda v: scatter_or(guest.flat, short[v], guest.dirty)), rounds=MANY)
    return 2 * one / two, 2 * bare_one / bare_two


def under_harvest(guest: Guest, pool: ThreadPoolExecutor, seconds: float = 2.0) -> tuple[float, float, int]:
    """Return M writes/s of two vCPU threads while a third harvests, ms that a harvest waits for vCPUs, and harvests."""
    until, done, harvests, waited = threading.Event(), [0, 0], 0, guest.vm.kvm.kick_wait_s

    def write(v: int) -> None:
        batch, over = guest.random[v][: 1 << 20], False
        while not over:
            over = until.is_set()
            guest.write(v, batch)
            done[v] += len(batch)

    threads, start = [pool.submit(write, v) for v in range(2)], time.perf_counter()
    while time.perf_counter() - start < seconds:
        guest.vm.get_dirty_log(0)
        harvests += 1
    until.set()
    for thread in threads:
        thread.result()
    taken = time.perf_counter() - start
    return sum(done) / taken / 1e6, (guest.vm.kvm.kick_wait_s - waited) / harvests * 1e3, harvests


def rows(pages: int) -> list[Row]:
    """Measure everything on a guest of `pages`."""
    guest = Guest(pages)
    with ThreadPoolExecutor(3) as pool:
        alone = best(lambda: guest.write(0, guest.random[0]), guest.set_all) / WRITES * 1e9
        bitmap = guest.vm.memslots.bitmap(guest.vm.memslots.find(0))
        dirty = np.packbits(np.random.default_rng(1).random(pages) < 0.01, bitorder="little").view(np.uint64)
        words, out = dirty.copy(), np.zeros_like(dirty)

        def refill() -> None:
            guest.set_all()
            bitmap[:] = dirty

        def refill_limit() -> None:
            guest.flat[:] = ~np.uint64(0)
            words[:] = dirty

        guest.share()
        random, bare_random = scaling(guest, pool, guest.random)
        sweep, bare_sweep = scaling(guest, pool, guest.ascending)
        one = best(lambda: guest.write(0, guest.random[0]), guest.set_all) / WRITES * 1e9
        scatter = best(lambda: scatter_or(guest.flat, guest.random[0], guest.dirty)) / WRITES * 1e9
        logged = best(lambda: guest.write(0, guest.random[0]), guest.clear_all) / WRITES * 1e9
        harvest = best(lambda: guest.vm.get_dirty_log(0), refill)
        zeros = best(lambda: rearm_by_zeros(guest.flat, words, out, guest.mode[0].lay.dirty_shift), refill_limit)
        rate, wait, harvests = under_harvest(guest, pool)
    return [
        Row("two vCPU threads, random writes on disjoint halves, over one", random, "x", 1.7),
        Row("the bare scatter on two threads over one", bare_random, "x"),
        Row("two vCPU threads, ascending writes, over one", sweep, "x", 0.9 * bare_sweep),
        Row("the bare loop on two threads over one", bare_sweep, "x"),
        Row("random writes, W and D set, variant for threads on one thread, over the bare scatter", one / scatter, "x", 2.0, False),
        Row("the same, variant for one thread", alone / scatter, "x"),
        Row("random writes, PML logs each, variant for threads on one thread, over the bare scatter", logged / scatter, "x", 3.0, False),
        Row("harvest, 1 % dirty, variant for threads, no vCPU in the guest, over a trailing-zeros loop", harvest / zeros, "x", 2.0, False),
        Row("two vCPU threads while a third harvests all the time", rate, "M writes/s"),
        Row(f"wait of a harvest for vCPUs, mean of {harvests}", wait, "ms"),
    ]


def table(pages: int, measured: list[Row]) -> str:
    """Return the markdown table."""
    head = (f"guest of {pages * PAGE >> 20} MiB, 4 KiB leaves, ept-pml", "figure", "mark", "")
    lines = [head, (":--", "--:", "--:", ":--"), *(row.cells for row in measured)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(args: list[str] | None = None) -> int:
    """Measure, print the table, and put it into the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--guest", default="4G", help="guest memory, a multiple of 2 MiB: 256M, 4G, 1T")
    parser.add_argument("page", nargs="?", type=Path, help="gets the table between its marks")
    chosen = parser.parse_args(args)
    pages = guest_pages(chosen.guest)
    made = table(pages, rows(pages))
    print(made)
    if chosen.page is not None:
        before, start, rest = chosen.page.read_text().partition(MARK)
        _, end, after = rest.partition(END)
        if not start or not end:
            parser.error(f"{chosen.page} has no {MARK} ... {END}")
        chosen.page.write_text(f"{before}{MARK}\n{made}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
