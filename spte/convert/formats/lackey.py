"""Valgrind's lackey with --trace-mem=yes: stores (S) and modifications (M); the clock is the count of instructions (I)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from spte.convert import scan
from spte.convert.source import PAD, Block, Source
from spte.convert.writes import Writes
from spte.platform import PAGE_SIZE

ABOUT = "valgrind --tool=lackey --trace-mem=yes"
NS_PER_INSTRUCTION = 1
"""Lackey knows no time: an instruction counts as 1 ns."""
ADDRESS = 3
"""Column of the address in a line such as ` S 1ffefffe40,8`."""
TAIL = 1 << 12
"""Bytes at the end that hold lackey's summary."""
_PAGE_SHIFT = np.uint64(12)
_BANNER = re.compile(rb"^==\d+== Lackey", re.MULTILINE)
_ACCESS = re.compile(rb"^(?:I  | [LSM] )[0-9a-f]{6,16},\d+$", re.MULTILINE)
_COMMAND = re.compile(rb"^==\d+== Command: (.*)$", re.MULTILINE)
_COUNTED = re.compile(rb"^==\d+== +guest instrs: +([\d,]+)\s*$", re.MULTILINE)


def looks_like(head: bytes) -> bool:
    """Return whether lackey's banner, or a line of its trace, is there."""
    return bool(_BANNER.search(head) or _ACCESS.search(head))


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the writes of the one source to `writes`; the regions that the program never wrote are squeezed out."""
    writes.squeeze = True
    for number, source in enumerate(sources):
        if number:
            raise source.error("lackey's clock starts anew in each file; convert one after the other")
        instructions, tail = 0, b""
        command = _COMMAND.search(source.head)
        if command:
            writes.meta["command"] = command[1].decode("utf-8", "replace").strip()
        banner = bool(_BANNER.search(source.head))
        for block in source.blocks():
            instructions = _parse(block, instructions, writes)
            tail = block.data[-TAIL:-PAD].tobytes()
        counted = _COUNTED.findall(tail)
        if not banner:
            continue
        if not counted:
            writes.note(f"{source.name}: lackey's summary is missing at the end: the program was killed, or the file was cut off")
        elif int(counted[-1].replace(b",", b"")) != instructions:
            raise source.error(
                f"has {instructions} instructions where lackey counted {counted[-1].decode()}: lines are missing; trace again"
            )
    writes.meta["time"] = f"instructions, {NS_PER_INSTRUCTION} ns each"


def _parse(block: Block, instructions: int, writes: Writes) -> int:
    """Give a block's writes to `writes`; return the instructions up to its end."""
    data, starts, ends = block.data, block.starts, block.ends
    kind, mark = data[starts], data[starts + 1]  # PAD bytes follow the last line
    is_instruction = (kind == ord("I")) & (mark == ord(" "))
    is_access = (kind == ord(" ")) & ((mark == ord("S")) | (mark == ord("M")) | (mark == ord("L")))
    is_message = ((kind == ord("=")) | (kind == ord("-")) | (kind == ord("*"))) & (mark == kind)
    foreign = np.flatnonzero(~(is_instruction | is_access | is_message) & (ends > starts))
    if len(foreign):
        raise block.error(int(foreign[0]), "is no line of lackey; keep the program's own output out of it with --log-file")
    clock = instructions + np.cumsum(is_instruction)
    rows = np.flatnonzero(is_access & (mark != ord("L")))
    first = starts[rows] + ADDRESS
    commas = np.flatnonzero(data == ord(","))
    comma, there = scan.next_in_line(commas, first, ends[rows])
    address = scan.hexadecimal(data, first, np.where(there, comma, first))
    size = scan.decimal(data, np.where(there, comma + 1, first), np.where(there, ends[rows], first))
    bad = np.flatnonzero(~(address.ok & size.ok) | (size.value == 0) | (size.value > PAGE_SIZE))
    if len(bad):
        raise block.error(int(rows[bad[0]]), "is no store of lackey's; it looks like ' S 1ffefffe40,8'")
    page = address.value >> _PAGE_SHIFT
    last = (address.value + size.value - np.uint64(1)) >> _PAGE_SHIFT
    straddles = last != page
    t_ns = clock[rows] * NS_PER_INSTRUCTION
    order = np.argsort(np.concatenate([t_ns, t_ns[straddles]]), kind="stable")
    writes.at(
        np.concatenate([t_ns, t_ns[straddles]])[order].astype(np.int64),
        np.concatenate([page, last[straddles]])[order],
    )
    return int(clock[-1])
