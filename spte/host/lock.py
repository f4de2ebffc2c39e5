"""One lock for each VM and each `Backing`; those that share memory share it, because a fault in one VM drops SPTEs of the others.

Who waits gets in before the one that holds the lock comes again: a thread that finds it taken stands in the gate, and whoever comes
while somebody stands there goes behind. A batch of guest accesses sees a word of its VM set meanwhile, and lets the other in.
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

    __slots__ = ("gate", "gone", "main", "members", "serial", "waiting")

    def __init__(self, member: ExclusiveLock) -> None:
        self.serial = next(_serials)  # who takes several takes them in this order
        self.gate, self.main = threading.Lock(), threading.RLock()
        self.members: tuple[weakref.ref[ExclusiveLock], ...] = (weakref.ref(member),)
        self.waiting = False  # somebody stands in the gate
        self.gone = False  # another one has taken its place; then `waiting` stays set, so that everybody notices

    def pass_gate(self) -> None:
        """Take `main`; the caller holds `gate`."""
        if self.main.acquire(blocking=False):
            return
        self._ask(True)
        try:
            self.main.acquire()
        finally:
            self._ask(self.gone)

    def _ask(self, waiting: bool) -> None:
        self.waiting = waiting
        for ref in self.members:
            if (member := ref()) is not None:
                member.needbreak[0] = waiting

    def take(self) -> None:
        """Take `main` before all who come later."""
        with self.gate:
            self.pass_gate()

    def absorb(self, other: _Turnstile) -> None:
        """Take the place of `other`; the caller holds `gate` and `main` of both."""
        other.gone = other.waiting = True
        members = [member for ref in (*self.members, *other.members) if (member := ref()) is not None]
        self.members, other.members = tuple(map(weakref.ref, members)), ()
        for member in members:
            member.turnstile = self


class ExclusiveLock:
    """The lock of one VM or `Backing`, to be held by ``with``; a thread that holds it may take it again.

    Parameters
    ----------
    needbreak : ndarray of int64[1]
        Set while somebody waits: rwlock_needbreak. Mutated.
    """

    __slots__ = ("__weakref__", "needbreak", "turnstile")

    def __init__(self, needbreak: I64s) -> None:
        self.needbreak = needbreak
        self.turnstile = _Turnstile(self)

    def __enter__(self) -> None:
        turnstile = self.turnstile
        if not turnstile.main.acquire(False):
            self._take()
        elif turnstile.waiting:
            turnstile.main.release()
            self._take()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.turnstile.main.release()

    def _take(self) -> None:
        while True:
            turnstile = self.turnstile
            if turnstile.main._is_owned():  # type: ignore[attr-defined]  # who stands in the gate waits for this thread
                turnstile.main.acquire()
            else:
                turnstile.take()
            if self.turnstile is turnstile:
                return
            turnstile.main.release()

    @property
    def contended(self) -> bool:
        """Somebody waits for it."""
        return self.turnstile.waiting

    def let_in(self) -> None:
        """Let in who waits; the caller holds the lock, and holds it again afterwards, whatever is raised."""
        self.turnstile.main.release()
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
                held.callback(turnstile.main.release)
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
                held.callback(turnstile.main.release)
            if not any(turnstile.gone for turnstile in turnstiles):
                for other in turnstiles[1:]:
                    turnstiles[0].absorb(other)
