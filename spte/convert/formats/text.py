"""Text or CSV of `time gfn`, one write a line."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from decimal import Decimal

import numpy as np

from spte.convert.scan import MAX_DECIMALS, Mask, Uint64Array, fixed_point, number
from spte.convert.source import PAD, Block, Positions, Source
from spte.convert.writes import UNITS, Writes
from spte.trace.build import MAX_TIME_NS
from spte.trace.collect import GFN_BITS

ABOUT = "text or CSV: time and page, or address, of a write a line"
PAGE_SHIFT = 12
_NUMBER = rb"[+-]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_LINE = re.compile(rb"\s*" + _NUMBER + rb"(?:\s*[,;]\s*|\s+)" + _NUMBER + rb"\s*$")
_NAME = re.compile(rb"""\s*["']?[A-Za-z_][\w .()/"'-]*\s*""")
_NO_NUMBERS = (b"nan", b"inf", b"infinity")
_COMMENT = 35
_SPACE = np.zeros(256, np.bool_)
_SPACE[list(b" \t,;\r\n")] = True


def looks_like(head: bytes) -> bool:
    """Return whether the first line that is no comment and no header has two numbers."""
    lines = [line for line in head.split(b"\n") if line.strip() and not line.lstrip().startswith(b"#")]
    return any(_LINE.match(line) for line in lines[:2])


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the writes of `sources` to `writes`."""
    digits = UNITS[writes.options.time_unit or "s"]
    for source in sources:
        for block in source.blocks():
            t_ns, gfn, rows = _parse(block, digits, writes.options.addresses)
            writes.at(t_ns, gfn, functools.partial(block.error_at, rows))


def _parse(block: Block, digits: int, addresses: bool) -> tuple[Positions, Uint64Array, Positions]:
    """Return time in ns, page and place of each line; comments, empty lines and a header are left out."""
    data = block.data
    inside = ~_SPACE[data]
    inside[-PAD:] = False
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    start, end = edges[::2], edges[1::2]
    line = block.line_of(start)
    first = np.flatnonzero(np.diff(line, prepend=-1) != 0)
    last = np.append(first[1:], len(start))
    # Lines of two fields are parsed at once; all others, and those of two in which a number is spelled otherwise, one by one.
    rows, fields = line[first], last - first
    kept = data[start[first]] != _COMMENT
    rows, fields, first = rows[kept], fields[kept], first[kept]
    second = np.minimum(first + 1, max(len(start) - 1, 0))
    times, _ = fixed_point(data, start[first], end[first], digits)
    pages = number(data, start[second], end[second])
    good = (fields == 2) & times.ok & pages.ok & _separated(block, rows, end[first], start[second])
    t_ns, gfn = times.value.astype(np.int64), pages.value
    skipped = np.zeros(len(rows), np.bool_)
    for i in np.flatnonzero(~good).tolist():
        if block.first_line + rows[i] == _header_line(block, rows) and _is_header(_line(block, rows[i])):
            skipped[i] = True
        else:
            t_ns[i], gfn[i] = _parse_line(block, int(rows[i]), digits)
    gfn >>= np.uint64(PAGE_SHIFT if addresses else 0)
    far = np.flatnonzero((gfn >> np.uint64(GFN_BITS) != 0) & ~skipped)
    if len(far):
        raise block.error(int(rows[far[0]]), f"is page {int(gfn[far[0]]):#x}, beyond 52 bits of address; addresses need --bytes")
    return t_ns[~skipped], gfn[~skipped], rows[~skipped]


def _separated(block: Block, rows: Positions, end: Positions, start: Positions) -> Mask:
    """Return for each row of two fields whether at most one comma or semicolon is in it, between them."""
    marks = np.flatnonzero((block.data == ord(",")) | (block.data == ord(";")))
    if not len(marks):
        return np.ones(len(rows), np.bool_)
    line_end = block.ends[rows]
    line_start = block.starts[rows]
    between = np.searchsorted(marks, start) - np.searchsorted(marks, end)
    in_line = np.searchsorted(marks, line_end) - np.searchsorted(marks, line_start)
    good: Mask = (in_line == between) & (between <= 1)
    return good


def _header_line(block: Block, rows: Positions) -> int:
    """Return the number of the only line that may be a header: the file's first that is no comment; 0: it has passed."""
    return int(rows[0]) + 1 if block.first_line == 1 and len(rows) else 0


def _is_header(line: bytes) -> bool:
    """Return whether a line names columns: at least two, none of which is a number, though `nan` and `inf` are spelled as names."""
    names = re.split(rb"[,;\t]", line) if re.search(rb"[,;\t]", line) else line.split()
    return len(names) > 1 and all(_NAME.fullmatch(name) and name.strip().lower() not in _NO_NUMBERS for name in names)


def _line(block: Block, row: int) -> bytes:
    return block.data[int(block.starts[row]) : int(block.ends[row])].tobytes()


def _parse_line(block: Block, row: int, digits: int) -> tuple[int, int]:
    text = _line(block, row)
    if not _LINE.match(text):
        raise block.error(row, "is not a time and a page; one write a line, such as '0.25 4711' or '0.25,0x1267'")
    time, page = re.split(r"\s*[,;]\s*|\s+", text.decode().strip())
    t_ns = _whole(time, digits, exact=False)
    gfn = int(page, 16) if page[:2].lower() == "0x" else _whole(page, 0, exact=True)
    if t_ns is None or gfn is None or not 0 <= gfn < 1 << 64:
        raise block.error(row, "has a number that is out of range, or a page that is no whole number")
    return t_ns, gfn


def _whole(spelled: str, digits: int, *, exact: bool) -> int | None:
    """Return a number times 10^digits, cut off unless it must be `exact`; None if it is neither whole nor within `MAX_TIME_NS`."""
    try:
        number = Decimal(int(spelled, 16)) if spelled[:2].lower() == "0x" else Decimal(spelled)
        if number and number.adjusted() + digits > MAX_DECIMALS:  # 1e999999999 would be written out otherwise
            return None
        if exact and number != number.to_integral_value():
            return None
        scaled = int(number.scaleb(digits))
    except (ArithmeticError, ValueError):
        return None
    return scaled if exact or abs(scaled) <= MAX_TIME_NS else None
