"""Forged recordings of a guest that runs a guest: refused with a line that says what is wrong, never a traceback or an endless run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spte.errors import SlotRangeError
from spte.recording import file as rec
from spte.replay.guest import UnsupportedOp
from spte.replay.ops import HANDLERS
from spte.replay.payload import TABLE_SLOT
from spte.replay.run import Replay

HEADER = next(iter(rec.read_all(Path(__file__).parent.parent / "golden" / "6.12-nested-intel-pml.tar.xz"))).header
Record = dict[str, Any]
SLOT: list[tuple[str, Record]] = [
    ("backing", {"name": "a", "kind": "4k", "size": 64 * 4096}),
    ("create_slot", {"slot": 0, "gpa": 0x10000000, "size": 64 * 4096, "backing": "a"}),
]
FORGED: list[tuple[Record, list[tuple[str, Record]], type[Exception], str]] = [
    ({"l2_ept": 0, "l2_pml": 1}, [], rec.RecordingError, "l2_pml=1 needs EPT with A/D bits"),
    ({"l2_ad": 0, "l2_pml": 1}, [], rec.RecordingError, "l2_pml=1 needs EPT with A/D bits"),
    ({}, [("guest_seq", {"seq": "S:5/e"})], rec.RecordingError, "root 5 of a sequence does not exist"),
    ({"l2_ept": 0}, [("guest_seq", {"seq": "S:1/e"})], rec.RecordingError, "root 1 of a sequence does not exist"),
    ({"l2_ept": 0}, [("guest_seq", {"seq": "P:0x20000=7"})], rec.RecordingError, "made with l2_ept=0"),
    ({}, [("guest_seq", {"seq": "P:0x20000=7"})], UnsupportedOp, "entry for page 0x20000, which it has not mapped"),
    ({}, [("guest_seq", {"seq": "R:0x20000=0x100"})], UnsupportedOp, "entry for page 0x20000, which it has not mapped"),
    ({}, [("l1_ept_write", {"gfns": [[0x20000, 1 << 18]], "to": 5})], rec.RecordingError, "more than 131072 pages"),
    ({}, [("delete_slot", {"slot": TABLE_SLOT}), ("enter_l2", {})], UnsupportedOp, "mmio at page 0xd0000"),
]


@pytest.mark.parametrize(("arguments", "ops", "error", "message"), FORGED)
def test_a_forged_recording_is_refused(arguments: Record, ops: list[tuple[str, Record]], error: type[Exception], message: str) -> None:
    replay = Replay(HEADER)
    ops = [("new_vm", {"nested": "auto", **arguments}), *SLOT, *ops]
    try:
        with pytest.raises(error, match=message):
            [replay.step({"i": i, "op": op, "args": args}) for i, (op, args) in enumerate(ops)]
    finally:
        replay.machine.close()


def test_what_the_vm_refuses_names_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, Any]:
        raise SlotRangeError("gfn 0x5 is out of reach")

    monkeypatch.setitem(HANDLERS, "collect_ring", refuse)
    replay = Replay(HEADER)
    try:
        with pytest.raises(rec.RecordingError, match="op 4, collect_ring, can not be performed: EINVAL: gfn 0x5 is out of reach"):
            replay.step({"i": 4, "op": "collect_ring", "args": {}})
    finally:
        replay.machine.close()
