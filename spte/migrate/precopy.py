"""Pre-copy: enable logging, send all, send what became dirty meanwhile, again and again, then stop the guest and send the rest.

The link sends one page after the other, each for as long as its bytes take; a page is read when its turn comes. The guest writes
meanwhile. Each page has a version on the source, which a write counts up, and one on the destination, which sending copies: at the end
the two must be equal.

Where QEMU does something else: it takes a harvest as soon as what remains would fit into the downtime, here a round sends all it
has first; it skips pages of zeros and adds 8 bytes of header a page.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from spte.migrate.guest import Guest, changes
from spte.migrate.logs import Log, log_of, pages_in
from spte.migrate.plan import Plan
from spte.migrate.report import Downtime, Outcome, Round, Source
from spte.migrate.throttle import Throttle
from spte.platform import PAGE_SIZE
from spte.policy import parse
from spte.warm import steps_of, warmup

Pages = npt.NDArray[np.uint64]
LONGEST_STEP_NS, SHORTEST_STEP_NS = 10_000_000, 500_000
"""How long vCPUs run before what they lost is taken from them, where anything is: the shorter, the more they lose."""
LATE_NS = 50_000
"""What a vCPU may lose in a step, as far as the shortest one allows."""
NEVER = np.int64(2**62)
NONE = np.empty(0, np.uint64)

Progress = Callable[[Round], None]
"""Called as progress(round) after each round."""


class _TimeIsUp(Exception):  # noqa: N818 - no error: it ends the rounds
    """The longest time has passed."""


def migrate(plan: Plan, *, progress: Progress | None = None) -> Outcome:
    """Migrate the guest of `plan`, on the model.

    Parameters
    ----------
    plan : Plan
        What to do.
    progress : callable, optional
        Called with each `Round` when it has ended.

    Returns
    -------
    Outcome
        The rounds, how it ended, and the pages that were lost, which are none unless the model or the VMM is at fault.

    Raises
    ------
    KvmError
        If the platform, the policy or the ring's size is refused.
    """
    guest = Guest(plan)
    warmup(steps=steps_of([parse(plan.policy)], rings=plan.log == "ring"))
    with guest.vm:
        return _Run(plan, guest, progress).outcome()


class _Run:
    """One migration under way."""

    def __init__(self, plan: Plan, guest: Guest, progress: Progress | None) -> None:
        self.plan, self.guest, self.progress = plan, guest, progress
        self.throttle = Throttle(plan.throttle, plan.vcpu_dirty_limit)
        self.now = self.sent = 0
        self.rounds: list[Round] = []
        self.source = np.zeros(guest.npages, np.uint32)
        self.destination = np.zeros(guest.npages, np.uint32)
        self._step = LONGEST_STEP_NS
        self._read_at = np.full(guest.npages, NEVER)

    def outcome(self) -> Outcome:
        guest = self.guest
        guest.populate()
        self.source += 1
        huge = guest.vm.stats()["vm"]["pages_2m"]
        log = log_of(guest, self.plan)
        downtime = None
        enabled = guest.enable()
        try:
            self._pass(round(enabled.ns))
            downtime = self._stop(log, self._precopy(log))
        except _TimeIsUp:
            log.harvest()
        finally:  # whatever ends it: nobody else turns logging off
            self.throttle.stop()
            logging = guest.vm.stats()["vm"]["pages_2m"]
            guest.set_logging(0)
        lost = np.flatnonzero(self.source != self.destination).astype(np.uint64) if downtime is not None else NONE
        return Outcome(
            downtime is not None, self.now, downtime, self.sent, tuple(self.rounds), lost, self._estimated(enabled.ns),
            self._left(huge, logging),
        )  # fmt: skip

    def _precopy(self, log: Log) -> Pages:
        """Send rounds until what remains fits into the downtime; returns it."""
        _, ns = log.harvest()  # with initially-set all pages; they are sent anyway
        self._pass(round(ns))
        pages = np.arange(self.guest.npages, dtype=np.uint64)
        while True:
            pages, harvest_ns = self._round(log, pages)
            if self.plan.fixed_ns + harvest_ns + self.plan.wire_ns(len(pages)) <= self.plan.downtime_ns:
                return pages

    def _round(self, log: Log, pages: Pages) -> tuple[Pages, int]:
        """Send `pages` and harvest; returns what became dirty, and how long the harvest took, ns."""
        guest, start, sent = self.guest, self.now, self.sent
        stall, vmm, before = guest.stall_ns, guest.vmm_ns, guest.counters()
        percent, limit = self.throttle.percent, self.throttle.limit
        dirty: Pages | None = None
        try:
            for first, part in log.chunks(pages):
                self._pass(round(log.before_send(first)))
                self._pass(self.plan.wire_ns(len(part)), part)
            words, ns = log.harvest()
            dirty = pages_in(words, guest.npages)
            self._pass(round(ns))
        finally:
            unsent = len(pages) - (self.sent - sent)
            self.rounds.append(Round(
                len(self.rounds) + 1, start, self.now - start, self.sent - sent, None if dirty is None else len(dirty),
                unsent if dirty is None else len(dirty), self._estimated(guest.stall_ns - stall),
                self._estimated(guest.vmm_ns - vmm), percent, limit, changes(before, guest.counters()),
            ))  # fmt: skip
            if self.progress is not None:
                self.progress(self.rounds[-1])
        self.throttle.harvested(self.now, len(dirty), self.sent - sent)
        return dirty, round(ns)

    def _estimated(self, ns: float) -> int | None:
        return None if self.plan.costs is None else round(ns)

    def _stop(self, log: Log, pages: Pages) -> Downtime:
        """Stop the guest and send the rest."""
        words, ns = log.harvest(running=False)
        rest = np.union1d(pages, pages_in(words, self.guest.npages))
        self.destination[rest.astype(np.intp)] = self.source[rest.astype(np.intp)]
        downtime = Downtime(round(ns), self.plan.wire_ns(len(rest)), self.plan.fixed_ns)
        self.sent += len(rest)
        self.now += downtime.total_ns
        return downtime

    def _pass(self, ns: int, pages: Pages = NONE) -> None:
        """Let `ns` pass; `pages` go over the link meanwhile, one after the other."""
        plan, passed, sent = self.plan, 0, 0
        in_steps = plan.costs is not None or self.throttle.limit is not None
        while passed < ns:
            if self.now >= plan.max_ns:
                raise _TimeIsUp
            step = min(ns - passed, plan.max_ns - self.now)
            if in_steps:
                step = min(step, self._step)
            writing = plan.stop_ns is None or self.now < plan.stop_ns
            if writing and plan.stop_ns is not None:
                step = min(step, plan.stop_ns - self.now)
            passed += step
            # Those that are read before the step's end; at the end of all the rest: at a high rate several are read in the last ns.
            due = len(pages) if passed == ns else min(len(pages), -(-passed * plan.bandwidth // (PAGE_SIZE * 10**9)))
            wrote = self._let_run(step) if writing else []
            self._deliver(pages[sent:due], sent, passed - step, wrote)
            self.sent += due - sent
            sent = due
            self.now += step

    def _let_run(self, ns: int) -> list[tuple[npt.NDArray[np.int64], Pages]]:
        """Let the guest run for `ns`, and choose the next step by what it lost."""
        stalled = self.guest.stall_ns
        wrote = self.guest.run(ns, self.throttle.percent, self.throttle.limit)
        lost = (self.guest.stall_ns - stalled) / len(wrote)
        self._step = LONGEST_STEP_NS if not lost else min(LONGEST_STEP_NS, max(SHORTEST_STEP_NS, int(ns * LATE_NS / lost)))
        return wrote

    def _deliver(self, pages: Pages, number: int, began: int, wrote: list[tuple[npt.NDArray[np.int64], Pages]]) -> None:
        """Count up the versions of what the guest wrote, and copy those of `pages`, each when its turn comes.

        The first of them is the `number`th of this stretch, which began `began` ns before the step.
        """
        at = pages.astype(np.intp)
        numbers = np.arange(number, number + len(pages), dtype=np.int64)
        whole, rest = divmod(PAGE_SIZE * 10**9, self.plan.bandwidth)
        self._read_at[at] = numbers * whole + numbers * rest // self.plan.bandwidth - began
        later = []
        for done, gfns in wrote:
            index = gfns.astype(np.intp)
            early = done <= self._read_at[index]
            np.add.at(self.source, index[early], 1)
            later.append(index[~early])
        self.destination[at] = self.source[at]
        for index in later:
            np.add.at(self.source, index, 1)
        self._read_at[at] = NEVER

    def _left(self, huge: int, logging: int) -> Source:
        """Let the guest write all its memory once more, now that logging is off."""
        guest = self.guest
        before = guest.counters()
        guest.write_again()
        changed = changes(before, guest.counters())
        in_rings = sum(int(np.count_nonzero(vcpu.ring["flags"])) for vcpu in guest.vm.vcpus)
        return Source(
            huge, logging, guest.vm.stats()["vm"]["pages_2m"], changed["faults_fast"] + changed["faults_slow"],
            changed["dirty_marks"] + changed["pml_entries"] + in_rings, guest.vm.nr_memslots_dirty_logging,
        )  # fmt: skip
