"""Two columns on one workload: the counts of each operation that differ, and the first operation after which the SPTEs do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from spte.diff.tables import Leaf, digest, leaves
from spte.profile.columns import Column
from spte.profile.phases import Observe, Plan, Run
from spte.profile.report import Phase, Row
from spte.profile.run import prepare
from spte.profile.workload import Workload
from spte.vm.vm import VM

OPERATIONS = {
    "populate": "populate", "enable": "enable", "dirty": "fault", "get": "GET", "clear": "CLEAR", "collect": "collect",
    "reset": "RESET", "disable": "disable", "retouch": "retouch",
}  # fmt: skip
"""Kinds of phases, and the operation that each is: what the guest does in an epoch is `fault`."""
COUNTS = (
    "sptes_written", "splits_2m", "splits_1g", "zapped", "collapsed", "faults_fast", "faults_slow", "exits", "pml_entries", "pml_full",
    "ring_full", "dirty_marks", "flushes", "cpu_dirty_logging_requests", "vcpu_kicks",
)  # fmt: skip
"""What is compared: SPTEs by what is done to them, faults, exits, logs, flushes and requests to vCPUs."""


class Change(NamedTuple):
    """A count of an operation, summed over all epochs, that differs: of A, and of B."""

    operation: str
    name: str
    a: int
    b: int


class First(NamedTuple):
    """The first operation after which something differs.

    Parameters
    ----------
    operation : str
        Its name.
    epoch : int
        Its epoch, from 1; 0 outside epochs.
    a, b : str
        What A has there, and B.
    """

    operation: str
    epoch: int
    a: str
    b: str


class Difference(NamedTuple):
    """What differs between two columns.

    Parameters
    ----------
    changes : tuple of Change
        Counts, operation by operation in the order of time.
    sptes : First or None
        The first operation after which SPTEs differ.
    comparable : bool
        SPTEs of both have one layout; else they are not compared.
    a, b : Row
        All counts of both.
    """

    changes: tuple[Change, ...]
    sptes: First | None
    comparable: bool
    a: Row
    b: Row

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return bool(self.changes) or self.sptes is not None


def diff(workload: Workload, a: Column, b: Column) -> Difference:
    """Perform `workload` on both columns, then let the guest write every page once more, and return what differs.

    Parameters
    ----------
    workload : Workload
        What the guest does.
    a, b : Column
        What does it.

    Raises
    ------
    KvmError
        If a column is refused.
    """
    prepare((a, b))
    comparable = (a.on.paging, a.on.ad_bits) == (b.on.paging, b.on.ad_bits)
    seen = _Digests()
    row_a = _perform(workload, a, seen.note if comparable else None)
    row_b = _perform(workload, b, seen.compare if comparable else None)
    first = None
    if seen.differs is not None:
        again = _Until(seen.differs[0])
        _perform(workload, a, again.look)
        first = _first(again.phase, again.leaves, seen.differs[1])
    return Difference(tuple(_changes(row_a, row_b)), first, comparable, row_a, row_b)


def _perform(workload: Workload, column: Column, observe: Observe | None) -> Row:
    with (run := Run(workload, column, Plan(retouch=True), observe)).vm:
        return run.row(lambda done: None)


def _changes(a: Row, b: Row) -> list[Change]:
    found = []
    kinds = dict.fromkeys(phase.kind for row in (a, b) for phase in row.phases)
    for kind in kinds:
        for name in COUNTS:
            values = [sum(phase.counts[name] for phase in row.phases if phase.kind == kind) for row in (a, b)]
            if values[0] != values[1]:
                found.append(Change(OPERATIONS[kind], name, *values))
    return found


def _first(phase: Phase, a: Sequence[Leaf], b: Sequence[Leaf]) -> First:
    """Return the first leaves that differ; where all are equal, tables do."""
    for one, other in zip_longest(a, b):
        if one != other:
            return First(OPERATIONS[phase.kind], phase.iteration, *(str(leaf) if leaf else "no leaf" for leaf in (one, other)))
    return First(OPERATIONS[phase.kind], phase.iteration, "the same leaves", "tables that differ")


class _Digests:
    """Digests of A's tables after each step, with which B's are compared as they come."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.at = 0
        self.differs: tuple[int, list[Leaf]] | None = None

    def note(self, vm: VM, phase: Phase) -> None:
        self.digests.append(digest(vm))

    def compare(self, vm: VM, phase: Phase) -> None:
        if self.differs is None and (self.at >= len(self.digests) or digest(vm) != self.digests[self.at]):
            self.differs = self.at, leaves(vm)
        self.at += 1


class _Until:
    """A's leaves after a step."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.leaves: list[Leaf] = []
        self.phase = Phase("populate", 0)

    def look(self, vm: VM, phase: Phase) -> None:
        if self.left == 0:
            self.leaves, self.phase = leaves(vm), phase
        self.left -= 1
