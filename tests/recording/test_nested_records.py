"""Records of a guest that runs a guest: every key is known, and every kind of difference is found where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spte.check.compare import NESTED_KEYS, InForce, differences, fields_of
from spte.check.difference import Difference
from spte.recording import file as rec

GOLDEN = Path(__file__).parent.parent / "golden"
ARCHIVES = sorted(GOLDEN.glob("6.12-nested-*.tar.xz"))
Record = dict[str, Any]
Change = Callable[[list[Record]], tuple[int, str]]


@cache
def load(name: str) -> rec.Recording:
    archive = GOLDEN / "6.12-nested-intel-pml.tar.xz"
    return next(r for r in rec.read_all(archive) if r.name.split(":")[-1].startswith(name + "-"))


def walk(expected: list[Record], got: list[Record]) -> Iterator[tuple[int, Difference]]:
    force, model = InForce(), InForce()
    for a, b in zip(expected, got, strict=True):
        assert not force.apply(a)
        model.apply(b)
        assert fields_of(a, force) > len(NESTED_KEYS) + 1
        for found in differences(a, b, force, model, reasons="exit_reasons" in a):
            yield a["i"], found


def changed(name: str, change: Change) -> tuple[int, str, list[tuple[int, Difference]]]:
    records = load(name).records
    other = copy.deepcopy(records)
    i, key = change(other)
    return i, key, list(walk(records, other))


def roots(records: list[Record], mmu: str, which: str = "cur") -> Iterator[tuple[Record, Record]]:
    for record in records:
        for entry in record.get("mmu", ()):
            if (entry["mmu"], entry["which"]) == (mmu, which):
                yield record, entry


def leaf(place: int, value: Callable[[Any], Any], *, level: int = 1) -> Change:
    def change(records: list[Record]) -> tuple[int, str]:
        for record, entry in roots(records, "guest_mmu"):
            for row in entry.get("leafs", ()):
                if row[0] == level:
                    row[place] = value(row[place])
                    return record["i"], "mmu[0 guest_mmu cur].leafs"
        raise AssertionError("no such leaf")

    return change


def root(key: str, value: Any, mmu: str = "guest_mmu", which: str = "cur") -> Change:
    def change(records: list[Record]) -> tuple[int, str]:
        record, entry = next((r, e) for r, e in roots(records, mmu, which) if "root" not in e)
        assert entry.get(key) != value
        entry[key] = value
        return record["i"], f"mmu[0 {mmu} {which}].{key}"

    return change


def table(records: list[Record]) -> tuple[int, str]:
    record, entry = next((r, e) for r, e in roots(records, "guest_mmu") if e.get("tables"))
    entry["tables"][-1][6] ^= 1
    return record["i"], "mmu[0 guest_mmu cur].tables"


def lost_root(mmu: str, which: str) -> Change:
    def change(records: list[Record]) -> tuple[int, str]:
        record, entry = next(roots(records, mmu, which))
        record["mmu"].remove(entry)
        return record["i"], f"mmu[0 {mmu} {which}]"

    return change


def another_root(records: list[Record]) -> tuple[int, str]:
    record, entry = next(roots(records, "guest_mmu"))
    record["mmu"].append({**entry, "which": "prev2"})
    return record["i"], "mmu[0 guest_mmu prev2]"


def shared_root(records: list[Record]) -> tuple[int, str]:
    record, entry = next((r, e) for r, e in roots(records, "root_mmu") if "root" in e)
    entry["root"] = "same as 0 root_mmu prev0"
    return record["i"], f"mmu[{entry['vcpu']} root_mmu cur].root"


def nested(name: str) -> Change:
    def change(records: list[Record]) -> tuple[int, str]:
        record = [r for r in records if "nested" in r][1]
        value = record["nested"][name]
        record["nested"][name] = [value[0] ^ 1, *value[1:]] if isinstance(value, list) else value ^ 1
        return record["i"], f"nested.{name}"

    return change


def lost_nested(records: list[Record]) -> tuple[int, str]:
    record = [r for r in records if "nested" in r][1]
    del record["nested"]
    return record["i"], "nested.in_l2"


def in_record(key: str, change_value: Callable[[Any], Any], name: str, *, op: str | None = None) -> Change:
    def change(records: list[Record]) -> tuple[int, str]:
        record = next(r for r in records if r.get(key) not in (None, []) and op in (None, r["op"]))
        value = change_value(record.pop(key))
        if value is not None:
            record[key] = value
        return record["i"], name

    return change


def more_violations(records: list[Record]) -> tuple[int, str]:
    record = next(r for r in records if r["op"] == "l2_write" and "EPT_VIOLATION" in r.get("exit_reasons", {}))
    record["exit_reasons"]["EPT_VIOLATION"] += 1
    return record["i"], "exit_reasons.EPT_VIOLATION"


CHANGES: dict[str, tuple[str, Change]] = {
    "SPTE bit": ("n01", leaf(3, lambda flags: f"{int(flags, 16) ^ 2:x}")),
    "L1 gfn": ("n01", leaf(4, lambda gfn: gfn + 1)),
    "L2 gfn": ("n01", leaf(1, lambda gfn: gfn + 1)),
    "leaf count": ("n01", leaf(2, lambda count: count + 1)),
    "L1 gfn of a huge leaf": ("n16", leaf(4, lambda gfn: gfn + 512, level=2)),
    "leafs without L1 gfns": ("n02", root("leafs", [[1, 4096, 1, "b77"]], "root_mmu", "prev0")),
    "table attribute": ("n01", table),
    "MMIO SPTE": ("n01", root("other", [[1, 7, "8000000007027"]])),
    **{
        key: ("n01", root(key, value))
        for key, value in {
            "active": 0, "root_level": 5, "role": "30704", "pgd": "d004005f", "root_role": "20f04", "direct": 1,
            "guest_mode": 0, "root_invalid": 1,
        }.items()
    },
    "lost cached root": ("n02", lost_root("root_mmu", "prev0")),
    "lost root": ("n01", lost_root("guest_mmu", "cur")),
    "another root": ("n01", another_root),
    "shared root": ("n23", shared_root),
    **{f"nested {name}": ("n23", nested(name)) for name in NESTED_KEYS},
    "nested not renewed": ("n23", lost_nested),
    "qualification": ("n21", in_record("l1_exits", lambda rows: [[48, "1ab", rows[0][2]], *rows[1:]], "l1_exits[0]", op="l2_write")),
    "address": ("n21", in_record("l1_exits", lambda rows: [*rows[:-1], [48, "1aa", "0"]], "l1_exits[3]", op="l2_write")),
    "lost exit": ("n21", in_record("l1_exits", lambda rows: rows[1:] or None, "l1_exits[0]", op="leave_l2")),
    "one exit more": ("n21", in_record("l1_exits", lambda rows: [*rows, rows[-1]], "l1_exits[1]", op="leave_l2")),
    "PML log": ("i22", in_record("log", lambda gfns: [*gfns[:2], gfns[2] + 1, *gfns[3:]], "log[2]")),
    "lost PML log": ("i22", in_record("log", lambda gfns: None, "log")),
    "PML index": ("i22", in_record("pml_index", lambda index: index + 1, "pml_index")),
    "init_ret0": ("n01", lambda records: (records[0].update(init_ret0=1) or 0, "init_ret0")),
    "EPT violations": ("n01", more_violations),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_one_changed_value_is_found_where_it_was_changed(kind: str) -> None:
    i, key, found = changed(*CHANGES[kind])
    assert found
    where, first = found[0]
    assert (where, first.key) == (i, key)


def at(found: list[tuple[int, Difference]]) -> tuple[Any, ...]:
    return tuple(found[0][1][1:])


def first_leaf(name: str, level: int = 1) -> list[Any]:
    return next(row for _, entry in roots(load(name).records, "guest_mmu") for row in entry.get("leafs", ()) if row[0] == level)


def test_a_leaf_difference_names_the_level_and_the_gfns_of_both_guests() -> None:
    level, gfn, _, flags, l1_gfn = first_leaf("n01")
    assert at(changed("n01", leaf(4, lambda gfn: gfn + 1))[2]) == ([flags, l1_gfn], [flags, l1_gfn + 1], gfn, level)
    level, gfn, _, flags, l1_gfn = first_leaf("n16", 2)
    assert at(changed("n16", leaf(4, lambda gfn: gfn + 512, level=2))[2]) == ([flags, l1_gfn], [flags, l1_gfn + 512], gfn, level)


@pytest.mark.parametrize(("name", "level"), [("n01", 1), ("n16", 2)])
def test_the_l1_gfn_advances_with_its_run(name: str, level: int) -> None:
    step = 512 ** (level - 1)

    def split(shift: int) -> Change:
        def change(records: list[Record]) -> tuple[int, str]:
            for record, entry in roots(records, "guest_mmu"):
                for n, (rank, gfn, count, flags, l1_gfn) in enumerate(entry.get("leafs", ())):
                    if rank == level and count > 1:
                        rest = [rank, gfn + step, count - 1, flags, l1_gfn + shift]
                        entry["leafs"][n : n + 1] = [[rank, gfn, 1, flags, l1_gfn], rest]
                        place.append((gfn + step, rank))
                        return record["i"], "mmu[0 guest_mmu cur].leafs"
            raise AssertionError("no such run")

        return change

    place: list[tuple[int, int]] = []
    assert not changed(name, split(step))[2]
    i, key, found = changed(name, split(0))
    where, first = found[0]
    assert (where, first.key) == (i, key)
    assert (first.gfn, first.level) == place[-1]


def test_entries_of_the_tables_of_l1_are_compared_by_place() -> None:
    def change(value: Callable[[list[Any]], list[list[Any]]]) -> Change:
        def edit(records: list[Record]) -> tuple[int, str]:
            record = next(r for r in records if r["op"] == "l2_tables")
            record["entries"][:1] = value(record["entries"][0])
            return record["i"], "entries"

        return edit

    level, gfn, count, flags = next(r for r in load("n04").records if r["op"] == "l2_tables")["entries"][0]
    assert count > 1
    halves = change(lambda row: [[level, gfn, 1, flags], [level, gfn + 1, count - 1, flags]])
    assert not changed("n04", halves)[2]
    accessed = f"{int(flags, 16) | 0x100:x}"
    i, key, found = changed("n04", change(lambda row: [[level, gfn, 1, flags], [level, gfn + 1, count - 1, accessed]]))
    assert (found[0][0], found[0][1].key) == (i, key)
    assert at(found) == (flags, accessed, gfn + 1, level)


def test_tables_left_out_are_the_last_ones_of_that_root() -> None:
    def entry(role: str, **more: Any) -> Record:
        place = {"vcpu": 0, "mmu": "guest_mmu", "which": "cur", "pgd": "d0040000", "root_role": role}
        return {"i": 0, "op": "note", "args": {}, "mmu": [{**place, "leafs": [], **more}]}

    force = InForce()
    tables = {role: [[4, 0, 1, role, 0, 0, 0]] for role in ("20704", "30704")}
    for role in tables:
        force.apply(entry(role, tables=tables[role]))
    for role in tables:
        force.apply(entry(role))
        assert [root["tables"] for root in force.mmu.values()] == [tables[role]]
    force.apply({"i": 0, "op": "new_vm", "args": {}})
    assert not force.mmu
    force.apply(entry("20704"))
    assert [root["tables"] for root in force.mmu.values()] == [None]


def test_what_l1_does_with_its_own_instructions_is_not_compared() -> None:
    def change(records: list[Record]) -> tuple[int, str]:
        for record in records:
            for name in {"VMWRITE", "VMCALL", "VMLAUNCH", "VMRESUME"} & record.get("exit_reasons", {}).keys():
                record["exit_reasons"][name] += 1
        return 0, ""

    assert not changed("n21", change)[2]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda p: p.name)
def test_every_key_of_every_copy_is_known(archive: Path) -> None:
    found = [list(walk(recording.records, recording.records)) for recording in rec.read_all(archive)]
    assert found
    assert not any(found)


def test_a_key_that_no_table_knows_is_named() -> None:
    blank = {"i": 0, "op": "note", "args": {}}
    one, place = {"vcpu": 0}, {"vcpu": 0, "mmu": "root_mmu", "which": "cur"}
    assert InForce().apply({**blank, "mmu": [{**place, "colour": 5}]}) == ["mmu.colour"]
    assert InForce().apply({**blank, "mmu": [{**one, "active": 1}]}) == ["mmu.active"]
    assert InForce().apply({**blank, "nested": {"colour": 5}}) == ["nested.colour"]
    assert InForce().apply({**blank, "exit_reasons": {"VMFUNC": 1}}) == ["exit_reasons.VMFUNC"]


def test_what_holds_for_the_guest_of_a_guest_ends_with_its_vm() -> None:
    force = InForce()
    force.apply(load("n01").records[0])
    assert force.nested.keys() == set(NESTED_KEYS)
    force.apply({"i": 1, "op": "new_vm", "args": {}})
    assert not force.nested
