"""Proof by many writes: ``python -m bench.stress`` lets vCPU threads write while another thread harvests, and looks for lost writes.

A write stores a stamp of its own in its page, after its look at the SPTE as a CPU does. The harvesting thread copies the pages that it is
told of, as live migration does. After each round the vCPUs stop, a last harvest is copied, and every page must be equal to its copy.
In the meantime logging is turned off and on (huge pages come back and are split), a second slot moves or is deleted, and the host takes
pages away by madvise and fork. Exit code 1: a write was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

import spte
from spte import mm
from spte.errors import NoDirtyLogError

PAGE, LOG = 4096, 1
BASE, PAGES, MOVED = 512, 1 << 15, 64
PLACES = 1 << 18, (1 << 18) + 4096  # gfns where slot 1 may be
# Writes of a batch; RUN of them go to WINDOW pages side by side, so that a page's last write of a round may be early or late.
BATCH, RUN, WINDOW = 1 << 17, 512, 256
ROUND = 1 << 24  # writes of all vCPUs
CHUNK = 4096  # pages of one CLEAR
TOGGLE = 16  # harvests from one time that logging is turned off and on to the next
PLATFORMS, MODES, THREADS = ("ept-pml", "npt"), ("get", "manual 1", "manual 3", "ring"), (2, 4, 8)


@dataclass
class Result:
    """What one guest went through."""

    writes: int = 0
    harvests: int = 0
    events: int = 0
    seconds: float = 0.0
    lost: list[int] = field(default_factory=list)


class Migration:
    """A guest of `vcpus` threads, and the copy of its pages that a migration makes."""

    def __init__(self, platform: str, mode: str, vcpus: int, seed: int = 0, pages: int = PAGES) -> None:
        manual = int(mode[-1]) if mode.startswith("manual") else 0
        self.mode, self.pages, self.seed = mode, pages, seed
        self.vm = spte.VM(platform, vcpus=vcpus, manual=manual, ring_bytes=16 << 12 if mode == "ring" else 0)
        self.vm.exclusive.meet()  # vCPUs run beside each other from the first run on
        self.host, self.moved = spte.Backing("thp", pages * PAGE), spte.Backing("4k", MOVED * PAGE)
        self.memory = np.zeros(PLACES[1] + MOVED, np.uint64)
        for vcpu in self.vm.vcpus:
            vcpu.arrays = vcpu.arrays._replace(memory=self.memory)
        self.copy = np.zeros(pages + MOVED, np.uint64)
        self.copying = threading.Lock()  # held while pages are looked at and copied
        self.taken = [0] * vcpus
        self.place = itertools.cycle(PLACES)
        self.rng = np.random.default_rng(seed)
        self.result = Result()
        self.others: list[Future[None]] = []  # what harvests and disturbs
        self.move()
        self.enable()

    # -- what threads do --------------------------------------------------------------------------------------------------

    def write(self, v: int, writes: int) -> int:
        """Write from vCPU `v`; pages of slot 1 are each of one vCPU, so that of two places the higher stamp is the page's."""
        rng, count = np.random.default_rng((self.seed, v, self.result.writes)), len(self.vm.vcpus)
        windows = BASE + np.repeat(rng.integers(0, self.pages - WINDOW, BATCH // RUN), RUN)
        batches, done = [windows + rng.integers(0, WINDOW, BATCH) for _ in range(4)], 0
        while done < writes:
            done += self.run(v, batches[rng.integers(len(batches))])
            done += self.run(v, PLACES[rng.integers(2)] + rng.integers(0, MOVED // count, 8) * count + v)
        return done

    def run(self, v: int, gfns: npt.NDArray[np.int64]) -> int:
        """Write `gfns` from vCPU `v`; returns how many of them were somewhere."""
        done = 0
        while len(gfns):
            stop = self.vm.vcpus[v].write(gfns)
            done += len(gfns) if stop is None else stop.index
            if stop is None:
                break
            if stop.reason == "mmio" and stop.gfn >= PLACES[0]:  # slot 1 is elsewhere
                break
            if stop.reason != "dirty_ring_full":
                raise RuntimeError(f"vCPU {v} stopped: {stop}")
            if any(other.done() for other in self.others):
                raise RuntimeError(f"vCPU {v}: its ring is full and nobody harvests")
            time.sleep(0)
            gfns = gfns[stop.index :]
        return done

    def migrate(self, until: threading.Event) -> None:
        """Harvest and copy; now and then turn logging off and on."""
        while not until.is_set():
            self.harvest()
            if self.rng.integers(TOGGLE) == 0:
                self.vm.set_memory_region(0, BASE * PAGE, self.pages * PAGE, self.host)
                self.enable()

    def disturb(self, until: threading.Event) -> None:
        """Let the host take pages away, move slot 1, look at the VM."""
        rng = np.random.default_rng((self.seed, self.result.events))
        actions: tuple[Callable[[], object], ...] = (
            lambda: mm.madvise(self.host, int(rng.integers(0, self.pages - 600)), int(rng.integers(1, 600))),
            lambda: mm.madvise(self.host, 0, 512, mm.PAGEOUT, ages=True),
            lambda: mm.fork([self.host]),
            lambda: self.moved.write(int(rng.integers(0, MOVED)), 1),
            self.move, self.renew, self.vm.stats, self.vm.check,
        )  # fmt: skip
        while not until.wait(float(rng.random()) * 0.01):
            actions[rng.integers(len(actions))]()
            self.result.events += 1

    def move(self) -> None:
        """Move slot 1."""
        self.vm.set_memory_region(1, next(self.place) * PAGE, MOVED * PAGE, self.moved, flags=LOG)

    def renew(self) -> None:
        """Delete slot 1 and create it again: what its log held is gone, so all of it is copied."""
        self.vm.set_memory_region(1, 0, 0)
        self.move()
        self.take(np.arange(self.pages, self.pages + MOVED))

    # -- harvests ---------------------------------------------------------------------------------------------------------

    def contents(self) -> npt.NDArray[np.uint64]:
        """What the pages hold now."""
        at_either = np.maximum(*(self.memory[place : place + MOVED] for place in PLACES))
        return np.concatenate([self.memory[BASE : BASE + self.pages], at_either])

    def take(self, pages: npt.NDArray[np.int64]) -> None:
        """Copy `pages`, those of slot 1 behind those of slot 0."""
        with self.copying:
            self.copy[pages] = self.contents()[pages]

    def enable(self) -> None:
        """Log slot 0 from now on; then all of it is copied."""
        self.vm.set_memory_region(0, BASE * PAGE, self.pages * PAGE, self.host, flags=LOG)
        self.take(np.arange(self.pages))

    def harvest(self) -> None:
        """Learn what is dirty, make the next writes visible, copy."""
        self.result.harvests += 1
        if self.mode == "ring":
            self.take(self.collect())
            return
        for slot, first, npages in ((0, 0, self.pages), (1, self.pages, MOVED)):
            with contextlib.suppress(NoDirtyLogError):  # slot 1 is deleted now and then
                self.harvest_slot(slot, first, npages)

    def harvest_slot(self, slot: int, first: int, npages: int) -> None:
        """GET, and CLEAR in chunks; pages of the slot are copied as numbers `first` and above."""
        bitmap = self.vm.get_dirty_log(slot)
        dirty = np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little"))
        if self.mode == "get":
            self.take(dirty + first)
            return
        for at in range(0, npages, CHUNK):
            count = min(CHUNK, npages - at)
            self.vm.clear_dirty_log(slot, at, count, bitmap[at // 64 : (at + count) // 64])
            self.take(dirty[(dirty >= at) & (dirty < at + count)] + first)

    def collect(self) -> npt.NDArray[np.int64]:
        """Return the pages in the rings, which are freed."""
        pages = []
        for v, vcpu in enumerate(self.vm.vcpus):
            ring = vcpu.ring
            order = (self.taken[v] + np.arange(len(ring))) % len(ring)
            dirty = ring["flags"][order] == 1
            entries = order[: len(ring) if dirty.all() else int(dirty.argmin())]
            pages.append(ring["offset"][entries].astype(np.int64) + self.pages * ring["slot"][entries].astype(np.int64))
            ring["flags"][entries] = 3
            self.taken[v] += len(entries)
        self.vm.reset_dirty_rings()
        return np.concatenate(pages)

    # -- rounds -----------------------------------------------------------------------------------------------------------

    def round(self, pool: ThreadPoolExecutor, writes: int = ROUND) -> None:
        """Let all threads run, then compare."""
        until, start = threading.Event(), time.perf_counter()
        self.others = [pool.submit(self.migrate, until), pool.submit(self.disturb, until)]
        count = len(self.vm.vcpus)
        try:
            done = [pool.submit(self.write, v, writes // count) for v in range(count)]
            self.result.writes += sum(each.result() for each in done)
        finally:
            until.set()
            for other in self.others:  # theirs is the cause, if they ended first
                other.result()
        self.harvest()
        self.result.seconds += time.perf_counter() - start
        self.result.lost += np.flatnonzero(self.copy != self.contents()).tolist()
        self.vm.check()

    def end(self) -> None:
        """Delete the slots and the VM."""
        for slot in (0, 1):
            self.vm.set_memory_region(slot, 0, 0)
        self.vm.close()


def stress(platform: str, mode: str, vcpus: int, writes: int, *, round_writes: int = ROUND, pages: int = PAGES) -> Result:
    """Run rounds until `writes` are done or one is lost."""
    migration = Migration(platform, mode, vcpus, pages=pages)
    with ThreadPoolExecutor(vcpus + 2) as pool:
        while migration.result.writes < writes and not migration.result.lost:
            migration.round(pool, round_writes)
    migration.end()
    return migration.result


def main(args: list[str] | None = None) -> int:
    """Run what the command line asks for, a line each."""
    parser = argparse.ArgumentParser(prog="python -m bench.stress", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--writes", type=float, default=1e9, help="of each combination (default 1e9)")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--platforms", nargs="+", default=PLATFORMS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    chosen = parser.parse_args(args)
    lost = 0
    for platform, mode, vcpus in itertools.product(chosen.platforms, chosen.modes, chosen.threads):
        r = stress(platform, mode, vcpus, int(chosen.writes))
        rate = r.writes / r.seconds / 1e6
        what = f"{r.writes:,} writes in {r.seconds:.1f} s ({rate:.1f} M/s), {r.harvests} harvests, {r.events} other events"
        print(f"{platform} {mode}, {vcpus} vCPUs: {what}, {len(r.lost)} lost" + (f": pages {r.lost[:8]}" if r.lost else ""), flush=True)
        lost += len(r.lost)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.setswitchinterval(1e-5)  # threads give way to each other at once
    sys.exit(main())
