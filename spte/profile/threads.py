"""A profile's guest with its vCPUs on threads, which go on while the VMM harvests and, if the workload says so, disables.

In each epoch every vCPU performs its accesses over and over on a thread of its own. Once each has performed them all, harvests follow
one another until each has performed them `PASSES` times more. After the return of the last one every vCPU performs one more batch.

Two kinds of pages must be in the harvest that comes next: those of the whole epoch, which were written between the return of one
harvest and the begin of the next, and those of the batch after the last one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from spte.access import WRITE
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.profile.columns import Column
from spte.profile.phases import Plan, ProfileError, Run
from spte.profile.report import Phase, Threads, compare
from spte.profile.workload import Access, Gfns, Workload
from spte.vm.dirty_log import goes_beside
from spte.vm.vm import VM

Work = dict[int, list[Access]]

PASSES = 4
"""How often each vCPU performs its epoch while harvests follow one another."""
PIECE = 1 << 16
"""Most accesses in one call of a vCPU: as fine as its progress is known."""
MOMENT_S = 0.001
"""Longest wait for a notice, which may have come just before the wait."""


def pieces(accesses: Iterable[Access]) -> Work:
    """Return the accesses of each vCPU that has any, in batches of at most `PIECE`."""
    work: Work = {}
    for vcpu, gfns, kinds in accesses:
        for first in range(0, len(gfns), PIECE):
            part = slice(first, first + PIECE)
            work.setdefault(vcpu, []).append(Access(vcpu, gfns[part], None if kinds is None else kinds[part]))
    return work


def written(access: Access) -> Gfns:
    """Return the gfns that `access` writes."""
    return access.gfns if access.kinds is None else access.gfns[access.kinds == WRITE]


class VcpuThreads:
    """vCPUs on threads of their own inside a ``with``, each of which performs its batches over and over until `end`.

    Parameters
    ----------
    vm : VM
        Their VM.
    work : dict of int to list of Access
        What each vCPU performs.
    """

    def __init__(self, vm: VM, work: Work) -> None:
        self._vm, self._work = vm, work
        self._changed = threading.Condition()  # a pass is over, a ring is full, or rings were reset
        self._ends, self._gives_up = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(max(len(work), 1))
        self._threads: list[Future[None]] = []
        self.passes = dict.fromkeys(work, 0)
        self._done = dict.fromkeys(work, 0)
        self.last: list[Access] = []

    def __enter__(self) -> VcpuThreads:
        try:
            self._threads = [self._pool.submit(self._perform, vcpu) for vcpu in self._work]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._gives_up.set()
        self.end()
        self._pool.shutdown()

    @property
    def accesses(self) -> int:
        """Accesses of batches that are over."""
        return sum(self._done.values())

    @property
    def running(self) -> bool:
        """Some thread has not ended; raises what one of them raised."""
        over = [thread for thread in self._threads if thread.done()]
        for thread in over:
            thread.result()
        return len(over) < len(self._threads)

    def have_passed(self, since: dict[int, int], passes: int) -> bool:
        """Tell whether each vCPU has performed all its batches `passes` times more than `since`; raises what a thread raised."""
        return all(self.passes[vcpu] >= before + passes for vcpu, before in since.items()) or not self.running

    def end(self) -> None:
        """Let each thread end after the first batch that it begins from now on; `last` gets these batches."""
        self._ends.set()

    def pause(self) -> None:
        """Wait for a notice of another thread, at most for a moment."""
        with self._changed:
            self._changed.wait(MOMENT_S)

    def notify(self) -> None:
        """Give those that `pause` a notice."""
        with self._changed:
            self._changed.notify_all()

    def _perform(self, vcpu: int) -> None:
        while True:
            for access in self._work[vcpu]:
                ends = self._ends.is_set()
                self._access(access)
                if self._gives_up.is_set():
                    return
                self._done[vcpu] += len(access.gfns)
                if ends:
                    self.last.append(access)
                    return
            self.passes[vcpu] += 1
            self.notify()

    def _access(self, access: Access) -> None:
        vcpu, gfns, kinds = self._vm.vcpus[access.vcpu], access.gfns, access.kinds
        while not self._gives_up.is_set():
            stop = vcpu.write(gfns) if kinds is None else vcpu.run(gfns, kinds)
            if stop is None:
                return
            if stop.reason != "dirty_ring_full":
                raise ProfileError(f"vCPU {access.vcpu} stopped at gfn {stop.gfn}: {stop.reason}")
            self.notify()
            self.pause()
            gfns = gfns[stop.index :]
            kinds = None if kinds is None else kinds[stop.index :]


class ThreadedRun(Run):
    """One VM, as `Run`, whose vCPUs are on threads while it logs."""

    def __init__(self, workload: Workload, column: Column, plan: Plan) -> None:
        super().__init__(workload, column, plan)
        self._seen = np.zeros_like(self.written)  # reported since what is expected was written
        self._harvests = self._reported = self._accesses_beside = self._lost = 0
        self._seconds = self._lock_wait_s = 0.0
        self._first_lost: int | None = None

    def measure(self, step: Callable[[int], None]) -> Threads:
        """Go through all phases; `step` is called with the number of each that is done."""
        kvm, work = self.vm.kvm, self.workload
        step(0)
        self._populate()
        step(1)
        if not self.plan.from_creation:
            self._toggle("enable", LOG_DIRTY_PAGES)
        self.written.fill(0)
        self._phases = [self._phase(kind) for kind in self.log.harvest]
        self.vm.exclusive.meet()
        before = self.vm.counters()
        for index in range(work.nepochs):
            self._go_on(pieces(work.epoch(index)))
            step(index + 2)
        beside = not kvm.mmu.has_shadow_pages, goes_beside(kvm)
        harvests, reported, wait_s = self._harvests, self._reported, self._lock_wait_s + kvm.kick_wait_s
        self._harvest()
        self._verify()
        disable_s = self._disable(pieces(work.during_disable()))
        counts = {name: value - before[name] for name, value in self.vm.counters().items()}
        return Threads(
            *beside, harvests, self._accesses_beside, self._seconds, wait_s, reported, counts, disable_s, self._lost, self._first_lost
        )

    def _go_on(self, work: Work) -> None:
        """Let vCPUs perform `work` and go on with it during harvests."""
        for batches in work.values():
            for access in batches:
                self._mark_written(written(access))
        if not work:
            return
        with VcpuThreads(self.vm, work) as vcpus:
            self._await_pass(vcpus)
            since, accesses, start = dict(vcpus.passes), vcpus.accesses, time.perf_counter()
            self._harvest()
            self._verify()
            while not vcpus.have_passed(since, PASSES):
                self._harvest()
                vcpus.notify()
            self._seconds += time.perf_counter() - start
            self._accesses_beside += vcpus.accesses - accesses
            self._seen.fill(0)
            self._await_end(vcpus)
        for access in vcpus.last:
            self._mark_written(written(access))

    def _disable(self, work: Work) -> float | None:
        """Disable logging while vCPUs go on with `work`; return how long it took, s, or None if there is none."""
        with VcpuThreads(self.vm, work) as vcpus:
            self._await_pass(vcpus)
            start = time.perf_counter()
            for slot in range(self.workload.slots):
                self._set_slot(slot, 0)
            seconds = time.perf_counter() - start
            self._await_end(vcpus)
        return seconds if work else None

    def _await_pass(self, vcpus: VcpuThreads) -> None:
        while not vcpus.have_passed(dict.fromkeys(vcpus.passes, 0), 1):
            self._free_rings(vcpus)

    def _await_end(self, vcpus: VcpuThreads) -> None:
        vcpus.end()
        while vcpus.running:
            self._free_rings(vcpus)

    def _free_rings(self, vcpus: VcpuThreads) -> None:
        """Let vCPUs go on whose rings are full, and wait for the next."""
        if self.log.ring_bytes:
            self._harvest()
            vcpus.notify()
        vcpus.pause()

    def _harvest(self) -> None:
        if self.log.ring_bytes:
            self.collected.fill(0)
            self._harvest_rings(*self._phases)
            logs = list(self.collected)
        else:
            logs = [self._harvest_slot(slot, *self._phases) for slot in range(self.workload.slots)]
        for seen, log in zip(self._seen, logs, strict=True):
            seen |= log
            self._reported += int(np.bitwise_count(log).sum(dtype=np.int64))
        self._harvests += 1

    def _verify(self) -> None:
        """Compare what was written with what was reported since."""
        found = compare(self.written, list(self._seen), self.per_slot, "over_reported")
        self._lost += found.lost
        if self._first_lost is None:
            self._first_lost = found.first_lost
        self.written.fill(0)

    @contextmanager
    def _account(self, phase: Phase, vcpu: dict[str, int] | None = None) -> Iterator[dict[str, int]]:
        """Time how long a call of a harvest waits where it excludes vCPUs. Counting here would have every vCPU leave the guest."""
        if phase.kind not in ("get", "clear", "reset") or goes_beside(self.vm.kvm):
            yield {}
            return
        start = time.perf_counter()
        with self.vm.exclusive:
            self._lock_wait_s += time.perf_counter() - start
            yield {}
