"""`spte check`: replay recordings of real KVM and compare after every op all that the format says is compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from spte.check.compare import InForce, differences, fields_of
from spte.check.difference import Difference
from spte.policy import Policy
from spte.recording.file import Recording
from spte.recording.ops import RUN_OPS
from spte.replay.guest import UnsupportedOp
from spte.replay.machine import PLATFORMS
from spte.replay.run import Replay


@dataclass(frozen=True, slots=True)
class Finding:
    """The first difference of a recording.

    Parameters
    ----------
    i : int
        Index of the op.
    op, key : str
        Name of the op, and the value that differs.
    gfn, level : int or None
        Where in the tables or the slot; None if the value has no place.
    expected, got : object
        What KVM did and what the model did.
    """

    i: int
    op: str
    key: str
    gfn: int | None
    level: int | None
    expected: Any
    got: Any

    def __str__(self) -> str:
        where = "" if self.gfn is None else f" gfn {self.gfn:#x} level {self.level}"
        return f"op {self.i} {self.op}: {self.key}{where}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True, slots=True)
class Report:
    """What the check of one recording found.

    Parameters
    ----------
    name : str
        The recording's name.
    ops : int
        Ops performed and compared.
    fields : int
        Values looked at.
    finding : Finding or None
        The first difference; the check of a recording ends there.
    kernel, config : str
        Version and machine that were recorded.
    nested : bool
        The guest runs a guest.
    """

    name: str
    ops: int
    fields: int
    finding: Finding | None
    kernel: str = ""
    config: str = ""
    nested: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return asdict(self)


def check(recording: Recording, policy: Policy | None = None) -> Report:
    """Replay `recording` and compare it with the model; ends at the first difference.

    Parameters
    ----------
    recording : Recording
        What a kernel did.
    policy : Policy, optional
        What the model does, in place of what the header's kernel does.

    Returns
    -------
    Report
        Counts, and the first difference if there is one.

    Raises
    ------
    RecordingError
        The recording can not be performed as written, or is of a machine that the model does not have.
    """
    nested = any("nested" in record["args"] for record in recording.records)
    ops, fields, finding = _compare(recording, policy)
    return Report(recording.name, ops, fields, finding, recording.header["kernel"], recording.header["config"], nested)


def _compare(recording: Recording, policy: Policy | None) -> tuple[int, int, Finding | None]:
    run = Replay(recording.header, policy=policy)
    force, model = InForce(), InForce()
    fields = 0
    traced = True
    try:
        for record in recording.records:
            i, op = record["i"], record["op"]
            unknown = force.apply(record)
            if unknown:
                return i, fields, Finding(i, op, unknown[0], None, None, "a known key", "unknown")
            try:
                got = run.step(record)
            except UnsupportedOp as error:
                return i, fields, Finding(i, op, "op", None, None, op, f"not modelled: {error}")
            if op == "set":
                traced = record["args"].get("trace", 1) == 1
            model.apply(got)
            reasons = traced and run.machine.intel and op in RUN_OPS
            first: Difference | None = next(differences(record, got, force, model, reasons=reasons), None)
            if first is not None:
                key, expected, actual, gfn, level = first
                return i, fields, Finding(i, op, key, gfn, level, expected, actual)
            fields += fields_of(record, force)
    finally:
        run.machine.close()
    return len(recording.records), fields, None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over many reports; `passed` only if there was at least one recording and no difference."""

    files: int
    ops: int
    fields: int
    differing: int

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differed."""
        return self.files > 0 and self.fields > 0 and self.differing == 0


def totals(reports: Iterable[Report]) -> Totals:
    """Return the sums over `reports`."""
    files = ops = fields = differing = 0
    for report in reports:
        files += 1
        ops += report.ops
        fields += report.fields
        differing += report.finding is not None
    return Totals(files, ops, fields, differing)


def matrix(reports: Iterable[Report]) -> list[list[str]]:
    """Return how many recordings of each machine pass: a head, then a row a machine and platform, a column a kernel and kind of guest."""
    cells: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        version = "Linux " + ".".join(report.kernel.split("-")[0].split(".")[:2])
        vendor = "Intel" if report.config.startswith("intel") else "AMD"
        cell = cells.setdefault((f"{vendor} {PLATFORMS[report.config]}", version + (", L2 guests" if report.nested else "")), [0, 0])
        cell[0] += report.finding is None
        cell[1] += 1
    machines, columns = (list(dict.fromkeys(key[n] for key in sorted(cells))) for n in (0, 1))
    columns.sort(key=lambda column: (column.endswith("guests"), [int(n) for n in re.findall(r"\d+", column)]))
    rows = [[f"{cells[m, c][0]} of {cells[m, c][1]}" if (m, c) in cells else "" for c in columns] for m in machines]
    return [["recorded on, platform", *columns], *([m, *row] for m, row in zip(machines, rows, strict=True))]


def check_all(recordings: Iterable[Recording], policy: Policy | None = None) -> Iterator[Report]:
    """Yield the report of each of `recordings`; `policy` as `check` takes it."""
    for recording in recordings:
        yield check(recording, policy)
