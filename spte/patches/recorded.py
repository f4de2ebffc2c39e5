"""What real kernels did in the scenarios of the patches: the same op of the same recording before the series and after it.

The values lie in ``data/recorded.json``; `write` takes them from the recordings anew, a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from spte.recording.file import Recording, RecordingError, find, read_all

DATA = Path(__file__).parent.parent / "data" / "recorded.json"
LARGE = 1 << 7
Records = list[dict[str, Any]]


class Place(NamedTuple):
    """Where a scenario was recorded.

    Parameters
    ----------
    before, after : str
        Folders of the recordings: a kernel before the series, and one after.
    machine, scenario : str
        Its machine and file.
    op : int
        Index of the op.
    quantity : str
        What is read off it; see `QUANTITIES`.
    """

    before: str
    after: str
    machine: str
    scenario: str
    op: int
    quantity: str

    @property
    def kernels(self) -> tuple[str, str]:
        """The two versions."""
        return self.before.split("-")[0], self.after.split("-")[0]


def _bare(machine: str, scenario: str, op: int, quantity: str) -> Place:
    return Place("5.10", "6.12", machine, scenario, op, quantity)


def _nested(scenario: str, op: int, quantity: str) -> Place:
    return Place("5.10-nested", "6.12-nested", "intel-pml", scenario, op, quantity)


PLACES: dict[str, tuple[Place, ...]] = {
    "P1-b": (_bare("amd-tdp", "b5_hugetlb2m", 12, "zapped"), _bare("amd-tdp", "b5_hugetlb2m", 12, "flushes")),
    "P2-a": (_bare("intel-nopml", "03-manual3-4k", 4, "written"), _bare("intel-nopml", "03-manual3-4k", 4, "flushes")),
    "P2-c": (_bare("amd-tdp", "c3_manual3_thp_eagerN", 5, "written"),),
    "P5-b": (_bare("amd-tdp", "d1_hva_misaligned", 7, "zapped"), _bare("amd-tdp", "d1_hva_misaligned", 7, "flushes")),
    "P6-a": (_nested("n60-pml-in-l2", 10, "entries"), _nested("n60-pml-in-l2", 12, "reported")),
    "P6-c": (_nested("n05-700-writes-ept", 11, "faults"), _nested("n05-700-writes-ept", 11, "entries")),
    "P6-c no EPT": (_nested("n06-700-writes-noept", 12, "reported"),),
    "P9-a": (_bare("intel-nopml", "00-smoke", 6, "kicks"),),
    "P10-b": (_bare("amd-tdp", "g2_set_region_errors", 24, "errno"),),
    "P11-a": (_nested("n01-basic-ept", 0, "pml_on"),),
    "P11-c": (_nested("n01-basic-ept", 10, "pml_on"),),
    "P12-a": (_bare("intel-pml", "00-smoke", 7, "written"), _bare("intel-pml", "00-smoke", 7, "flushes")),
    "P12-b": (_bare("intel-pml", "11-two-slots", 21, "entries"),),
    "P13": (_bare("intel-pml", "04-thp", 6, "flushes"),),
}
"""By name of the scenario."""


def _events(record: Mapping[str, Any], kind: str) -> Iterator[list[Any]]:
    """Yield the events of `kind` of an op, run lengths undone."""

    def each(events: Iterable[list[Any]]) -> Iterator[list[Any]]:
        for event in events:
            if event[0] == "rep":
                for _ in range(event[1]):
                    yield from each(event[3])
            else:
                yield event

    return (event for event in each(record.get("events", ())) if event[0] == kind)


def _zapped(records: Records, op: int) -> int:
    """Leaves that became non-present, by themselves or with their table."""
    leaves = 0
    for _, _, level, old, new, *_ in _events(records[op], "spte"):
        was, now = int(old, 16), int(new, 16)
        leaf = was & 0xFF and (level == 1 or was & LARGE)
        leaves += bool(leaf and not now & 0xF and not now & LARGE) or bool(leaf and now & 0xFFF in (0x5A0, 0x1A0))
    return leaves


def _stat(name: str, count: str) -> Callable[[Records, int], int]:
    """Return how to read the change of a statistic in an op, from its count where the kernel has no statistics."""

    def value(records: Records, op: int) -> int:
        if any("counts" in record for record in records):
            return int(records[op].get("counts", {}).get(count, 0))
        seen = [0, 0]
        for at, until in enumerate((op, op + 1)):
            last: dict[str, int] = {}
            for record in records[:until]:
                for who, values in record.get("stats", {}).items():
                    if name in values:
                        last[who] = values[name]
            seen[at] = sum(last.values())
        return seen[1] - seen[0]

    return value


QUANTITIES: dict[str, Callable[[Records, int], int | str]] = {
    "written": lambda records, op: sum(1 for _ in _events(records[op], "spte")),
    "zapped": _zapped,
    "flushes": _stat("remote_tlb_flush_requests", "flush_all"),
    "faults": _stat("pf_taken", "fault"),
    "entries": lambda records, op: sum(item[2] for item in records[op].get("hw", ()) if item[0] == "pml"),
    "reported": lambda records, op: sum(count for _, count in records[op].get("dirty", ())),
    "kicks": lambda records, op: sum(1 for _ in _events(records[op], "vcpu_kick")),
    "errno": lambda records, op: str(records[op].get("errno")),
    "pml_on": lambda records, op: [r["nested"]["pml01"][0] for r in records[: op + 1] if "nested" in r][-1],
}
"""What is read off an op, by name."""


class Recorded(NamedTuple):
    """What two kernels did: a value before the series and one after it."""

    place: Place
    before: int | str
    after: int | str


def extract(paths: Iterable[str | Path]) -> dict[str, list[int | str]]:
    """Return both values of each place, by ``scenario of the patch/quantity``, from archives named ``<folder>-<machine>.tar.xz``.

    Raises
    ------
    RecordingError
        A recording that is needed is not among `paths`.
    """
    wanted = {(folder, p.machine, p.scenario) for places in PLACES.values() for p in places for folder in (p.before, p.after)}
    found: dict[tuple[str, str, str], Recording] = {}
    for path in find(paths):
        for folder, machine, scenario in wanted:
            if path.name.split(".tar")[0] == f"{folder}-{machine}" and (folder, machine, scenario) not in found:
                members = {r.header["scenario"]: r for r in read_all(path)}
                found |= {key: members[key[2]] for key in wanted if key[:2] == (folder, machine) and key[2] in members}
    if missing := sorted("/".join(key) for key in wanted - found.keys()):
        raise RecordingError(f"no recording of {', '.join(missing)}; name the directory that has them")

    def values(place: Place) -> list[int | str]:
        records = (found[folder, place.machine, place.scenario].records for folder in (place.before, place.after))
        return [QUANTITIES[place.quantity](each, place.op) for each in records]

    return {f"{name}/{place.quantity}": values(place) for name, places in PLACES.items() for place in places}


def write(paths: Iterable[str | Path]) -> None:
    """Take the values from the recordings and store them in the package."""
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in extract(paths).items()]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@cache
def _stored() -> dict[str, list[int | str]]:
    values: dict[str, list[int | str]] = json.loads(DATA.read_text())
    return values


def recorded(name: str) -> list[Recorded]:
    """Return what was recorded of scenario `name` of a patch: nothing where no recording has it."""
    return [Recorded(p, *_stored()[f"{name}/{p.quantity}"]) for p in PLACES.get(name, ())]
