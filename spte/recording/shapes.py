"""The shapes of what a recorded op may hold besides its inputs: lists and objects that the comparison walks through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spte.recording.ops import INT64, RecordingError, is_int, short

_CONTAINERS: dict[str, type] = {
    "args": dict, "stats": dict, "kbitmap": dict, "exit_reasons": dict,
    "slots": list, "mmu": list, "exits": list, "events": list, "hw": list, "dirty": list, "entries": list,
    "nested": dict, "l1_exits": list, "log": list,
}  # fmt: skip

# One letter an item of a row: n a number, l a level 1..5, s a string.
_ROWS = {
    "leafs": "lnns", "tables": "lnnsnnn", "other": "lns", "disallow_l2": "nn", "disallow_l3": "nn", "kbitmap": "nn",
    "dirty": "nn", "entries": "nn", "l1_exits": "nss",
}  # fmt: skip
_L1_ENTRY = "lnns"  # `entries` of l2_tables
_GUEST_MMU_LEAF = "lnnsn"
_PML_ROW = "snnnls"
MMUS = ("root_mmu", "guest_mmu")
ROOTS = ("cur", "prev0", "prev1", "prev2")


def _is_row(row: object, shape: str) -> bool:
    if not isinstance(row, list) or len(row) != len(shape):
        return False
    for item, letter in zip(row, shape, strict=True):
        if letter == "s":
            if not isinstance(item, str):
                return False
        elif not is_int(item) or not (1 <= item <= 5 if letter == "l" else 0 <= item < INT64):
            return False
    return True


def _check_rows(where: str, holder: Mapping[str, Any], key: str, shape: str = "") -> None:
    shape = shape or _ROWS[key]
    rows = holder.get(key)
    if rows is None:
        return
    if not isinstance(rows, list):
        raise RecordingError(f"{where}: {key} is {short(rows)}, not a list")
    for row in rows:
        if not _is_row(row, shape):
            raise RecordingError(f"{where}: {key} holds {short(row)}, not {len(shape)} values of the right kind")


def _check_items(where: str, record: Mapping[str, Any], key: str, ids: tuple[str, ...]) -> None:
    for item in record.get(key, ()):
        if not isinstance(item, dict) or not all(is_int(item.get(name)) for name in ids):
            raise RecordingError(f"{where}: {key} holds {short(item)}, not an object with {' and '.join(ids)}")


def _check_mmu(where: str, entry: Mapping[str, Any]) -> None:
    """Check an entry of `mmu`: of a vCPU, or of one of the roots of a vCPU with a guest of its own."""
    if ("mmu" in entry or "which" in entry) and (entry.get("mmu") not in MMUS or entry.get("which") not in ROOTS):
        which = f"{short(entry.get('mmu'))} {short(entry.get('which'))}"
        raise RecordingError(f"{where}: mmu holds a root of {which}, not of {' or '.join(MMUS)} and {', '.join(ROOTS)}")
    for key in ("pgd", "root_role"):
        if key in entry and not isinstance(entry[key], str):
            raise RecordingError(f"{where}: mmu holds the {key} {short(entry[key])}, not a string")
    _check_rows(where, entry, "leafs", _GUEST_MMU_LEAF if entry.get("mmu") == "guest_mmu" else "")
    for key in ("tables", "other"):
        _check_rows(where, entry, key)


def check_shapes(record: Mapping[str, Any], where: str) -> None:
    """Raise RecordingError unless each key of `record` that is compared has the shape that the comparison expects."""
    for key, kind in _CONTAINERS.items():
        if key in record and not isinstance(record[key], kind):
            raise RecordingError(f"{where}: {key} is {short(record[key])}, not a {kind.__name__}")
    for who, values in record.get("stats", {}).items():
        if not isinstance(values, dict) or not all(map(is_int, values.values())):
            raise RecordingError(f"{where}: stats of {short(who)} are {short(values)}, not numbers by name")
    for key in ("dirty", "l1_exits"):
        _check_rows(where, record, key)
    _check_rows(where, record, "entries", _L1_ENTRY if record["op"] == "l2_tables" else "")
    if not all(map(is_int, record.get("log", ()))):
        raise RecordingError(f"{where}: log is {short(record['log'])}, not a list of numbers")
    for name, value in record.get("nested", {}).items():
        if not (is_int(value) or (isinstance(value, list) and all(map(is_int, value)))):
            raise RecordingError(f"{where}: nested.{name} is {short(value)}, not a number or a number a vCPU")
    _check_items(where, record, "slots", ("as", "id"))
    for slot in record.get("slots", ()):
        for key in ("disallow_l2", "disallow_l3", "kbitmap"):
            _check_rows(where, slot, key)
    for runs in record.get("kbitmap", {}).values():
        _check_rows(where, {"kbitmap": runs}, "kbitmap")
    _check_items(where, record, "mmu", ("vcpu",))
    for entry in record.get("mmu", ()):
        _check_mmu(where, entry)
    if not all(isinstance(item, dict) for item in record.get("exits", ())):
        raise RecordingError(f"{where}: exits hold something that is not an object")
    for item in record.get("hw", ()):
        if not isinstance(item, list) or not item or not isinstance(item[0], str):
            raise RecordingError(f"{where}: hw holds {short(item)}, not a list that begins with a name")
        if item[0] == "pml" and not _is_row(item, _PML_ROW):
            raise RecordingError(f"{where}: hw holds {short(item)}, not a run of PML entries")
