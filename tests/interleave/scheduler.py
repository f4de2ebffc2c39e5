"""Threads that run one at a time and may be switched at each access to a word that two of them use and one writes.

Schedules are explored by number of preemptions: switches away from a thread that could go on. A thread that waits for another gives
way, which is none. What happens on other words in between can not make a difference, so nothing is switched there. A run ends early
where an earlier one came by with as many preemptions or fewer: shared words hold the same, and each thread has read the same so far.
"""

import threading
from dataclasses import dataclass, field

import numpy as np


class Watched(np.ndarray):
    """A view of an array whose elements the scheduler sees being read and written, by `name` and place."""

    def __array_finalize__(self, base):
        self.name, self.scheduler = getattr(base, "name", ""), getattr(base, "scheduler", None)

    def key(self, index):
        if isinstance(index, tuple):
            row, column = index
            index = int(row) * self.shape[1] + int(column)
        return self.name, int(index)

    def __getitem__(self, index):
        if isinstance(index, slice) or self.scheduler is None:
            return super().__getitem__(index)
        key = self.key(index)
        self.scheduler.access(key, False)
        value = super().__getitem__(index)
        self.scheduler.saw(key, value, self, index, write=False)
        return value

    def __setitem__(self, index, value):
        if not isinstance(index, slice) and self.scheduler is not None:
            self.scheduler.access(self.key(index), True)
            self.scheduler.saw(self.key(index), value, self, index, write=True)
        super().__setitem__(index, value)


def watch(scheduler, name, array):
    view = array.view(Watched)
    view.name, view.scheduler = name, scheduler
    return view


@dataclass
class Decision:
    """Who went on at a switch point, who else could have, and the preemptions before it."""

    chosen: int
    others: list[tuple[int, int]]  # thread, preemptions that it costs
    used: int


class Stopped(BaseException):
    """Ends the threads of a run that failed, or that is known from here on."""


@dataclass
class Run:
    """One execution: what to choose at its first switch points, and what came of it."""

    prefix: tuple[int, ...] = ()
    decisions: list[Decision] = field(default_factory=list)
    trace: list[tuple[int, tuple[str, int], str]] = field(default_factory=list)
    touched: dict[tuple[str, int], set[tuple[int, bool]]] = field(default_factory=dict)
    used: int = 0
    known: bool = False  # it came to a state that an earlier run had come to


class Scheduler:
    """Runs programs, a thread each, and stands in for the lock of the plain atomic operations."""

    def __init__(self, count, hidden=tuple):
        """`hidden` returns what beside shared words decides how threads go on."""
        self.hidden, self.states, self.words = hidden, {}, {}
        self.count, self.shared, self.run, self.current = count, set(), None, -1
        self.jobs = [None] * count
        self.wake = [threading.Semaphore(0) for _ in range(count)]
        self.over = threading.Semaphore(0)
        self.steps = [""] * count  # of an atomic operation: "" none, "first" before its first access, "rest" after it
        for i in range(count):
            threading.Thread(target=self._work, args=(i,), daemon=True).start()

    # -- as the lock of atomic operations

    def __enter__(self):
        if self.current >= 0:
            self.steps[self.current] = "first"

    def __exit__(self, *error):
        if self.current >= 0:
            self.steps[self.current] = ""

    # -- accesses

    def access(self, key, write):
        me = self.current
        if me < 0 or self.steps[me] == "rest":
            if me >= 0 and write:
                self.run.touched[key].add((me, True))
                if key in self.shared:
                    self.run.trace[-1] = (*self.run.trace[-1][:2], "changes")
            return
        self.run.touched.setdefault(key, set()).add((me, write))
        if key not in self.shared:
            if self.steps[me]:
                self.steps[me] = "rest"
            return
        able = self._able(me)
        self._decide(me, [me, *able], [0] + [1] * len(able))
        self.run.trace.append((me, key, "writes" if write else "reads"))
        if self.steps[me]:
            self.steps[me] = "rest"

    def saw(self, key, value, array, index, *, write):
        """Take note of what the running thread has read or written."""
        if self.current >= 0 and key in self.shared:
            self.words[key] = array, index
            if write:
                self.waits = [set() if key in waits else waits for waits in self.waits]
                self.stale |= {i for i, reads in enumerate(self.reads) if key in reads and i != self.current}
            else:
                self.reads[self.current].add(key)
            self.seen[self.current] = hash((self.seen[self.current], key, int(value)))

    def _is_known(self, me, able):
        """Tell whether an earlier run came to this state with as many preemptions or fewer."""
        words = [int(np.ndarray.__getitem__(*self.words[key])) if key in self.words else None for key in self.order]
        waits = frozenset(self.alive), frozenset(self.stale), tuple(map(bool, self.waits))
        state = hash((tuple(words), tuple(self.seen), me, able[0], waits, self.hidden()))
        before = self.states.get(state)
        if before is not None and before <= self.run.used:
            return True
        self.states[state] = self.run.used
        return False

    def relax(self):
        """Give way until another thread writes a word that this one has read since it last gave way."""
        me = self.current
        reads, self.reads[me] = self.reads[me], set()
        if me in self.stale:
            self.stale.discard(me)
            return
        self.waits[me] = reads
        able = self._able(me)
        if not able:
            raise AssertionError("all threads wait")
        self._decide(me, able, [0] * len(able))

    def _able(self, me):
        return [i for i in sorted(self.alive) if i != me and not self.waits[i]]

    def _decide(self, me, able, costs):
        run = self.run
        at = len(run.decisions)
        if at >= len(run.prefix) and self._is_known(me, able):
            run.known, self.error = True, Stopped()
            raise self.error
        chosen = run.prefix[at] if at < len(run.prefix) else able[0]
        cost = dict(zip(able, costs, strict=True))
        run.decisions.append(Decision(chosen, [(i, c) for i, c in cost.items() if i != chosen], run.used))
        run.used += cost[chosen]
        if chosen != me:
            self.current = chosen
            self.wake[chosen].release()
            if me in self.alive:
                self.wake[me].acquire()
                if self.error is not None:
                    raise Stopped

    # -- execution

    def _work(self, i):
        while True:
            self.wake[i].acquire()
            try:
                if self.error is None:
                    self.jobs[i]()
            except BaseException as error:
                self.error = self.error or error
            self.alive.discard(i)
            self.steps[i] = ""
            if self.error is None and self.alive:
                try:
                    able = self._able(i)
                    self._decide(i, able, [0] * len(able))
                    continue
                except Stopped:
                    pass
            if self.alive:  # let the rest end
                self.wake[min(self.alive)].release()
                continue
            self.current = -1
            self.over.release()

    def execute(self, jobs, prefix):
        """Run `jobs`, one a thread, with the first choices `prefix`."""
        self.run, self.jobs, self.alive, self.error = Run(prefix), jobs, set(range(self.count)), None
        self.seen, self.order = [0] * self.count, sorted(self.shared)
        self.waits, self.reads = [set() for _ in range(self.count)], [set() for _ in range(self.count)]
        self.stale = set()  # threads that have read a word which was written since
        self._decide(-1, sorted(self.alive), [0] * self.count)
        self.over.acquire()
        if self.error is not None and not self.run.known:
            raise self.error
        return self.run


def conflicts(run):
    """Words that two threads used and one wrote."""
    return {key for key, uses in run.touched.items() if len({i for i, _ in uses}) > 1 and any(write for _, write in uses)}


def explore(scheduler, begin, verdict, bound, most=None):
    """Run every schedule with at most `bound` preemptions.

    `begin` restores the state and returns the jobs, `verdict` says what is wrong at the end. Returns ``(runs, failure, run)`` at the
    first failure, ``(runs, "", None)`` without one; RuntimeError after `most` runs.
    """
    scheduler.shared, count, todo = set(), 0, [[()]] + [[] for _ in range(bound)]
    scheduler.states.clear()
    while rest := next((each for each in todo if each), None):
        run = scheduler.execute(begin(), rest.pop())
        count += 1
        if not run.known and (failure := verdict()):
            return count, failure, run
        if new := conflicts(run) - scheduler.shared:  # a switch point more: begin again
            scheduler.shared |= new
            scheduler.states.clear()
            todo = [[()]] + [[] for _ in range(bound)]
            continue
        chosen = tuple(decision.chosen for decision in run.decisions)
        for at in range(len(run.prefix), len(chosen)):
            decision = run.decisions[at]
            for i, cost in decision.others:
                if decision.used + cost <= bound:
                    todo[decision.used + cost].append((*chosen[:at], i))
        if most is not None and count > most:
            raise RuntimeError(f"more than {most} schedules")
    return count, "", None
