"""One lock for each VM and each `Backing`; those that share memory share it, because a fault in one VM drops SPTEs of the others.

Who waits gets in before the one that holds the lock comes again: a thread that finds it taken stands in the gate, and whoever comes
while somebody stands there goes behind. A batch of guest accesses sees a word of its VM set meanwhile, and lets the other in.

From the first wait on, runs of vCPUs hold it shared, as KVM's faults hold mmu_lock for reading: they are inside together, and who takes
the lock asks them to leave and waits. Those that come meanwhile get in before the lock is taken again.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from spte.arrays.records import I64s

_serials = itertools.count()


class _Turnstile:
    """The lock of all that share it, and the gate before it."""

    __slots__ = ("changed", "depth", "gate", "gone", "main", "members", "met", "runs", "runs_wait", "serial", "telling", "turn",
                 "waiting")  # fmt: skip

    def __init__(self, member: ExclusiveLock) -> None:
        self.serial = next(_serials)  # who takes several takes them in this order
        self.gate, self.main = threading.Lock(), threading.RLock()
        self.members: tuple[weakref.ref[ExclusiveLock], ...] = (weakref.ref(member),)
        self.waiting = False  # somebody stands in the gate
        self.gone = False  # another one has taken its place; then `waiting` stays set, so that everybody notices
        self.met = False  # somebody has waited once
        self.telling = threading.Lock()  # so that the words of members are as the last change left it
        self.changed = threading.Condition(threading.Lock())  # guards the counts below, and tells of their changes
        self.depth = 0  # how often the thread that has `main` keeps runs out
        self.runs = 0  # that are inside
        self.runs_wait = 0  # runs that wait because `depth` is not 0
        self.turn = 0  # how many waiting runs get in before the lock is taken again

    def pass_gate(self) -> None:
        """Take `main`; the caller holds `gate`."""
        if self.main.acquire(blocking=False):
            return
        self.met = True
        self._ask(True)
        try:
            self.main.acquire()
        finally:
            self._ask(self.gone)

    def _ask(self, waiting: bool) -> None:
        with self.telling:
            self._tell(waiting)
            self.waiting = waiting

    def _tell(self, waiting: bool) -> None:
        for member in self._members():
            member.needbreak[0] = waiting or self.runs_wait > 0

    def _members(self) -> Iterator[ExclusiveLock]:
        return (member for ref in self.members if (member := ref()) is not None)

    def take(self) -> None:
        """Take `main` before all who come later, and keep runs out."""
        with self.gate:
            self.pass_gate()
        self.close()

    def close(self) -> None:
        """Keep runs out, and wait until those inside have left; the caller has `main`. Whatever is raised, `main` is given back."""
        # Set before the look, as a run counts itself before it looks: one of them sees the other.
        self.depth += 1
        if self.depth == 1 and (self.runs or self.turn):
            try:
                self._await_runs()
            except BaseException:
                self.release()
                raise

    def _await_runs(self) -> None:
        with self.changed:
            try:
                while self.turn:
                    self.changed.wait()
                self._kick(1)
                while self.runs:
                    self.changed.wait()
            finally:
                self._kick(0)

    def _kick(self, leave: int) -> None:
        for member in self._members():
            for word in member.kicked:
                word[0] = leave

    def release(self) -> None:
        """Give `main` back, and let runs in."""
        self.depth -= 1
        if self.depth == 0 and self.runs_wait:
            with self.changed:
                self.turn = self.runs_wait
                self.changed.notify_all()
        self.main.release()

    def enter_run(self) -> bool:
        """Count a run in, as soon as nobody keeps it out; False if another turnstile has taken the place."""
        with self.changed:
            self.runs += 1
            called = False
            while self.depth and not self.gone and not called:
                self.runs -= 1
                called = self._wait_for_turn()
                self.runs += 1
            self.runs -= self.gone
            return not self.gone

    def _wait_for_turn(self) -> bool:
        """Wait for the end of the one that keeps runs out; True if the run is among those that come before the next one."""
        self.met = True
        self._count_waiting(1)
        self.changed.notify_all()
        try:
            while self.depth and not self.turn and not self.gone:
                self.changed.wait()
            return self.turn > 0
        finally:
            self.turn = max(self.turn - 1, 0)
            self._count_waiting(-1)
            self.changed.notify_all()

    def _count_waiting(self, change: int) -> None:
        with self.telling:
            self.runs_wait += change
            self._tell(self.waiting)

    def leave_run(self) -> None:
        """Count a run out."""
        with self.changed:
            self.runs -= 1
            if not self.runs:
                self.changed.notify_all()

    def absorb(self, other: _Turnstile) -> None:
        """Take the place of `other`; the caller holds `gate` and `main` of both, and keeps runs out of both."""
        other.gone = other.waiting = True
        members = [*self._members(), *other._members()]
        with other.telling:  # who still waits there tells nobody from now on
            self.members, other.members = tuple(map(weakref.ref, members)), ()
        self.met |= other.met
        for member in members:
            member.turnstile = self
        self._ask(self.waiting)  # what the other had told them


class ExclusiveLock:
    """The lock of one VM or `Backing`, to be held by ``with``; a thread that holds it may take it again.

    Parameters
    ----------
    needbreak : ndarray of int64[1]
        Set while somebody waits: rwlock_needbreak. Mutated.
    """

    __slots__ = ("__weakref__", "kicked", "needbreak", "turnstile")

    def __init__(self, needbreak: I64s) -> None:
        self.needbreak = needbreak
        self.kicked: list[I64s] = []  # words that are set while runs that hold it shared are to leave
        self.turnstile = _Turnstile(self)

    def __enter__(self) -> None:
        turnstile = self.turnstile
        if not turnstile.main.acquire(False):
            self._take()
        elif turnstile.waiting:
            turnstile.main.release()
            self._take()
        else:
            turnstile.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.turnstile.release()

    def _take(self) -> None:
        self._take_main().close()

    def _take_main(self) -> _Turnstile:
        while True:
            turnstile = self.turnstile
            if turnstile.main._is_owned():  # type: ignore[attr-defined]  # who stands in the gate waits for this thread
                turnstile.main.acquire()
            else:
                with turnstile.gate:
                    turnstile.pass_gate()
            if self.turnstile is turnstile:
                return turnstile
            turnstile.main.release()

    @property
    def contended(self) -> bool:
        """Somebody waits for it."""
        return self.turnstile.waiting or self.turnstile.runs_wait > 0

    @property
    def is_mine(self) -> bool:
        """The calling thread holds it."""
        return bool(self.turnstile.main._is_owned())  # type: ignore[attr-defined]

    @property
    def met(self) -> bool:
        """A thread has waited for it once: from then on runs hold it shared."""
        return self.turnstile.met

    def meet(self) -> None:
        """Let runs hold it shared from now on, as if a thread had waited."""
        self.turnstile.met = True

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it with other runs, which the caller ends when it is asked to. The caller does not hold it."""
        while True:
            turnstile = self.turnstile
            if turnstile.enter_run():
                break
        try:
            yield
        finally:
            turnstile.leave_run()

    @contextmanager
    def beside_runs(self) -> Iterator[None]:
        """Hold it against all but runs that hold it shared."""
        turnstile = self._take_main()
        try:
            yield
        finally:
            turnstile.main.release()

    def let_in(self) -> None:
        """Let in who waits; the caller holds the lock, and holds it again afterwards, whatever is raised."""
        self.turnstile.release()
        try:
            self._take()
        except BaseException:
            self._take()
            raise


class _HasLock(Protocol):
    exclusive: ExclusiveLock


P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner", bound=_HasLock)


def exclusive(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """Let `method` hold the lock of its object."""

    @functools.wraps(method)
    def alone(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with owner.exclusive:
            return method(owner, *args, **kwargs)

    return alone


def _turnstiles(locks: tuple[ExclusiveLock, ...]) -> list[_Turnstile]:
    return sorted({lock.turnstile for lock in locks}, key=lambda turnstile: turnstile.serial)


@contextmanager
def all_of(*locks: ExclusiveLock) -> Iterator[None]:
    """Hold all of `locks` at once. The caller holds none."""
    while True:
        with ExitStack() as held:
            turnstiles = _turnstiles(locks)
            for turnstile in turnstiles:
                turnstile.take()
                held.callback(turnstile.release)
            if not any(turnstile.gone for turnstile in turnstiles):
                yield
                return


def share(*locks: ExclusiveLock) -> None:
    """Make one lock of `locks`, and of all that share with one of them, for good. The caller holds none."""
    while len(turnstiles := _turnstiles(locks)) > 1:
        with ExitStack() as held:
            for turnstile in turnstiles:
                held.enter_context(turnstile.gate)
                turnstile.pass_gate()
                turnstile.close()
                held.callback(turnstile.release)
            if not any(turnstile.gone for turnstile in turnstiles):
                for other in turnstiles[1:]:
                    turnstiles[0].absorb(other)
