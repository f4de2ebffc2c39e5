"""The interface scenarios that ship in the package: ops alone, whose results the host's KVM and the model both give."""

from __future__ import annotations

import dataclasses
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spte.recording.file import FORMAT, Recording, dumps, parse, read_all

SHIPPED = Path(__file__).parent.parent / "data" / "interface.tar.xz"
_NAMES = re.compile(r"(a\d|c\d|f\d|g1|g2)_")
_LOG = 1


def _ring_neighbours() -> list[dict[str, Any]]:
    """Ops whose reset of a ring joins neighbours into masks: forward, backward, across 64 pages, and too far apart."""
    ops: list[tuple[str, dict[str, Any]]] = [
        ("new_vm", {"vcpus": 1, "ring_bytes": 4096}), ("backing", {"name": "m", "kind": "4k", "size": 4 << 20}),
        ("create_slot", {"slot": 0, "gpa": 4 << 20, "size": 4 << 20, "backing": "m", "flags": _LOG}),
    ]  # fmt: skip
    for pages in ([128, 127, 144], [63, 64, 0], [10, 73, 9, 74], [500, 437, 564, 436]):
        runs = [[1024 + page, 1] for page in pages]
        for _ in range(2):
            ops += [("guest_write", {"gfns": runs}), ("guest_write", {"gfns": runs}), ("collect_ring", {}), ("reset_rings", {})]
        ops += [("guest_read", {"gfns": runs}), ("collect_ring", {})]
    return [{"i": i, "op": op, "args": args} for i, (op, args) in enumerate(ops)]


def interface() -> Iterator[Recording]:
    """Yield the shipped scenarios, by their names."""
    for recording in read_all(SHIPPED):
        yield dataclasses.replace(recording, name=recording.header["scenario"])


def ship(archive: str | Path, out: str | Path = SHIPPED) -> None:
    """Store the interface scenarios of an archive of recordings in the package, without their results, and one of its own.

    Parameters
    ----------
    archive : str or Path
        Recordings of real KVM.
    out : str or Path
        Where to.
    """
    found = {r.header["scenario"]: r.records for r in read_all(archive) if _NAMES.match(r.header["scenario"])}
    found["f4_ring_neighbours"] = _ring_neighbours()
    with tarfile.open(out, "w:xz") as store:
        for scenario, records in sorted(found.items()):
            header = {"format": FORMAT, "kernel": "", "config": "", "params": {}, "scenario": scenario}
            lines = [header, *({key: record[key] for key in ("i", "op", "args")} for record in records)]
            data = "".join(dumps(line) + "\n" for line in lines).encode()
            parse(scenario, data)
            member = tarfile.TarInfo(f"{scenario}.jsonl")
            member.size = len(data)
            store.addfile(member, io.BytesIO(data))
