"""`spte check` finds every kind of difference, and nothing passes it unseen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spte.check.compare import InForce, differences
from spte.check.difference import first_in_runs
from spte.check.run import Report, check, totals
from spte.recording import file as rec

GOLDEN = Path(__file__).parent.parent / "golden"
Records = list[dict[str, Any]]


def load(config: str, name: str) -> rec.Recording:
    return next(r for r in rec.read_all(GOLDEN / f"{config}.tar.xz") if r.name.endswith(f":{name}.jsonl"))


@pytest.fixture(scope="module")
def thp() -> rec.Recording:
    return load("6.12-amd-tdp", "b1_thp_eager")


@pytest.fixture(scope="module")
def ring() -> rec.Recording:
    return load("6.12-intel-pml", "19-ring")


def first(records: Records, key: str, *, op: str | None = None) -> dict[str, Any]:
    return next(r for r in records if key in r and op in (None, r["op"]))


def changed(recording: rec.Recording, change: Callable[[Records], tuple[int, str]]) -> tuple[Report, int, str]:
    records = copy.deepcopy(recording.records)
    i, key = change(records)
    return check(rec.Recording(recording.name, recording.header, records)), i, key


def flip_leaf(records: Records) -> tuple[int, str]:
    record = next(r for r in records if any(m.get("leafs") for m in r.get("mmu", ())))
    leaf = record["mmu"][0]["leafs"][-1]
    leaf[3] = f"{int(leaf[3], 16) ^ 0x40:x}"
    return record["i"], "mmu[0].leafs"


def shorten_leafs(records: Records) -> tuple[int, str]:
    record = next(r for r in records if any(m.get("leafs") for m in r.get("mmu", ())))
    record["mmu"][0]["leafs"][-1][2] += 1
    return record["i"], "mmu[0].leafs"


def flip_table(records: Records) -> tuple[int, str]:
    record = [r for r in records if any("tables" in m for m in r.get("mmu", ()))][1]
    record["mmu"][0]["tables"][-1][5] ^= 1
    return record["i"], "mmu[0].tables"


def other_entry(records: Records) -> tuple[int, str]:
    record = [r for r in records if "mmu" in r][1]
    record["mmu"][0]["other"] = [[1, 7, "8000000007027"]]
    return record["i"], "mmu[0].other"


def root(key: str, value: Any) -> Callable[[Records], tuple[int, str]]:
    def change(records: Records) -> tuple[int, str]:
        record = [r for r in records if "mmu" in r][1]
        record["mmu"][0][key] = value
        return record["i"], f"mmu[0].{key}"

    return change


def dirty_bit(records: Records) -> tuple[int, str]:
    record = next(r for r in records if r.get("dirty"))
    record["dirty"][0][1] += 1
    return record["i"], "dirty[0]"


def add(key: str, delta: int, op: str) -> Callable[[Records], tuple[int, str]]:
    def change(records: Records) -> tuple[int, str]:
        record = first(records, key, op=op)
        record[key] += delta
        return record["i"], key

    return change


def an_errno(records: Records) -> tuple[int, str]:
    record = first(records, "errno")
    record["errno"] = "EINVAL"
    return record["i"], "errno"


def stat(who: str, name: str) -> Callable[[Records], tuple[int, str]]:
    def change(records: Records) -> tuple[int, str]:
        record = next(r for r in records if name in r.get("stats", {}).get(who, {}))
        record["stats"][who][name] += 1
        return record["i"], f"stats.{who}.{name}"

    return change


def drop_stat(records: Records) -> tuple[int, str]:
    record = [r for r in records if "pf_taken" in r.get("stats", {}).get("vcpu0", {})][1]
    del record["stats"]["vcpu0"]["pf_taken"]
    return record["i"], "stats.vcpu0.pf_taken"


def an_exit(records: Records) -> tuple[int, str]:
    record = next(r for r in records if r["op"] == "guest_write" and "exits" not in r)
    record["exits"] = [{"exit": "dirty_ring_full"}]
    return record["i"], "exits[0]"


def slot(part: str, value: Any) -> Callable[[Records], tuple[int, str]]:
    def change(records: Records) -> tuple[int, str]:
        record = next(r for r in records if r.get("slots"))
        record["slots"][0][part] = value
        return record["i"], f"slots[{record['slots'][0]['id']}].{part}"

    return change


def lost_slot(records: Records) -> tuple[int, str]:
    record = next(r for r in records if r.get("slots"))
    gone = record["slots"].pop()
    return record["i"], f"slots[{gone['id']}]"


def kernel_bitmap(records: Records) -> tuple[int, str]:
    record = next(r for r in records if any(r.get("kbitmap", {}).values()))
    key = next(k for k, runs in record["kbitmap"].items() if runs)
    record["kbitmap"][key][0][0] += 1
    return record["i"], f"slots[{key}].kbitmap"


def unknown(place: Callable[[Any], Any], key: str, name: str) -> Callable[[Records], tuple[int, str]]:
    def change(records: Records) -> tuple[int, str]:
        record = next(r for r in records if r.get("slots") and r.get("mmu") and "stats" in r and r["i"])
        place(record)[key] = 5
        return record["i"], name

    return change


def unknown_op(records: Records) -> tuple[int, str]:
    records.append({"i": len(records), "op": "guest_dance", "args": {}})
    return len(records) - 1, "op"


def unknown_argument(records: Records) -> tuple[int, str]:
    record = next(r for r in records if r["op"] == "guest_write")
    record["args"]["speed"] = 3
    return record["i"], "op"


CHANGES = {
    "SPTE bit": flip_leaf, "leaf count": shorten_leafs, "table attribute": flip_table, "MMIO SPTE": other_entry,
    "root_level": root("root_level", 5), "role": root("role", "3783"), "root_invalid": root("root_invalid", 1),
    "root": root("pfn_mismatch", [1]), "dirty bit": dirty_bit, "ret": add("ret", 1, "set_flags"), "errno": an_errno,
    "bytes": add("bytes", 8, "get_dirty_log"), "pages_4k": stat("vm", "pages_4k"), "pages_2m": stat("vm", "pages_2m"),
    "flushes": stat("vm", "remote_tlb_flush_requests"), "pf_taken": stat("vcpu0", "pf_taken"),
    "pf_fixed": stat("vcpu0", "pf_fixed"), "pf_fast": stat("vcpu0", "pf_fast"), "statistic not renewed": drop_stat,
    "exit": an_exit, "slot flags": slot("flags", 7), "slot base": slot("base_gfn", 1), "slot pages": slot("npages", 3),
    "lpage_info level 2": slot("disallow_l2", [[1, 1]]), "lpage_info level 3": slot("disallow_l3", [[0, 1]]),
    "bitmap of a slot without": slot("kbitmap", [[0, 1]]), "lost slot": lost_slot, "kernel bitmap": kernel_bitmap,
    "unknown key": unknown(lambda r: r, "colour", "colour"),
    "unknown key of a slot": unknown(lambda r: r["slots"][0], "colour", "slots.colour"),
    "unknown key of a root": unknown(lambda r: r["mmu"][0], "colour", "mmu.colour"),
    "unknown statistic": unknown(lambda r: r["stats"]["vm"], "colour", "stats.vm.colour"),
    "unknown op": unknown_op, "unknown argument": unknown_argument,
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_one_changed_value_is_found_where_it_was_changed(thp: rec.Recording, kind: str) -> None:
    report, i, key = changed(thp, CHANGES[kind])
    assert report.finding is not None
    assert (report.finding.i, report.finding.key) == (i, key)
    assert report.ops == i


def test_a_leaf_difference_names_gfn_and_level(thp: rec.Recording) -> None:
    report, _, _ = changed(thp, flip_leaf)
    assert report.finding is not None
    assert report.finding.level == 2
    assert report.finding.gfn == 2048
    assert (report.finding.expected, report.finding.got) == ("ea7", "ee7")


@pytest.mark.parametrize(("op", "key"), [("collect_ring", "n"), ("reset_rings", "ret"), ("new_vm", "ring_ret")])
def test_a_changed_ring_result_is_found(ring: rec.Recording, op: str, key: str) -> None:
    report, i, _ = changed(ring, add(key, 1, op))
    assert report.finding is not None
    assert (report.finding.i, report.finding.key) == (i, key)


def test_the_order_of_ring_entries_and_of_pml_entries_is_compared(ring: rec.Recording) -> None:
    def swap_entries(records: Records) -> tuple[int, str]:
        record = next(r for r in records if len(r.get("entries", ())) > 1)
        record["entries"][:2] = record["entries"][1::-1]
        return record["i"], "entries[0]"

    def swap_pml(records: Records) -> tuple[int, str]:
        record = next(r for r in records if any(h[0] == "pml" for h in r.get("hw", ())))
        next(h for h in record["hw"] if h[0] == "pml")[1] += 1
        return record["i"], "hw[0]"

    def lose_pml(records: Records) -> tuple[int, str]:
        record = next(r for r in records if any(h[0] == "pml" for h in r.get("hw", ())))
        del record["hw"]
        return record["i"], "hw[0]"

    def fewer_full_exits(records: Records) -> tuple[int, str]:
        record = next(r for r in records if "PML_FULL" in r.get("exit_reasons", {}))
        record["exit_reasons"]["PML_FULL"] += 1
        return record["i"], "exit_reasons.PML_FULL"

    for change in (swap_entries, swap_pml, lose_pml, fewer_full_exits):
        report, i, key = changed(ring, change)
        assert report.finding is not None
        assert (report.finding.i, report.finding.key) == (i, key)


def test_no_op_can_be_lost_unseen(thp: rec.Recording) -> None:
    lost = set()
    for i, record in enumerate(thp.records[:-1]):
        if record["op"] in ("note", "param", "set") or not ({"stats", "slots", "mmu"} & record.keys()):
            continue
        records = [{**r, "i": n} for n, r in enumerate(thp.records[:i] + thp.records[i + 1 :])]
        try:
            report = check(rec.Recording("lost", thp.header, records))
        except rec.RecordingError:
            continue
        assert report.finding is not None, f"op {i} {record['op']} can be left out"
        lost.add(record["op"])
    assert lost == {"create_slot", "get_dirty_log", "guest_read", "guest_write", "set_flags"}


def test_an_op_without_a_model_is_a_difference(thp: rec.Recording) -> None:
    records = [*thp.records, {"i": len(thp.records), "op": "set_msr", "args": {"index": 16}, "ret": 1, "errno": "0"}]
    report = check(rec.Recording("x", thp.header, records))
    assert report.finding is not None
    assert report.finding.key == "op"
    assert "MSR 0x10" in report.finding.got


def test_what_is_merged_in_another_way_is_the_same() -> None:
    assert first_in_runs([[1, 0, 4, "e67"]], [[1, 0, 1, "e67"], [1, 1, 3, "e67"]]) is None
    where = first_in_runs([[2, 512, 2, "ee7"]], [[2, 512, 1, "ee7"], [1, 1024, 1, "e67"]])
    assert where is not None
    assert (where.gfn, where.level) == (1024, 2)
    assert first_in_runs([[1, 0, 4, "e67"]], [[1, 0, 5, "e67"]]) == (1, 4, None, "e67")


def test_values_stay_in_force_until_they_change() -> None:
    force = InForce()
    force.apply({"i": 0, "op": "new_vm", "args": {}, "stats": {"vm": {"pages_4k": 2}}, "slots": []})
    force.apply({"i": 1, "op": "note", "args": {}})
    assert force.stats == {("vm", "pages_4k"): 2}
    model = InForce()
    found = list(differences({}, {}, force, model, reasons=False))
    assert [d.key for d in found] == ["stats.vm.pages_4k"]


def test_nothing_compared_is_not_a_pass() -> None:
    assert not totals([]).passed


@pytest.mark.parametrize("config", ["arm64", "intel-tdx"])
def test_a_machine_without_a_model_is_refused(thp: rec.Recording, config: str) -> None:
    with pytest.raises(rec.RecordingError, match=config):
        check(rec.Recording("x", {**thp.header, "config": config}, thp.records))
