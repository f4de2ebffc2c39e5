"""Which format an input has, by its first bytes; what can not be told apart is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.convert.formats import bitmap, ftrace, lackey, npy, pagemap, ring, text
from spte.convert.source import Source, shown
from spte.convert.writes import Writes
from spte.trace import TraceError


class Format(NamedTuple):
    """A format: what it is, its reader, and the options that say something about it beside those of all."""

    about: str
    read: Callable[[Iterable[Source], Writes], None]
    options: frozenset[str] = frozenset()


FORMATS = {
    "bitmap": Format(bitmap.ABOUT, bitmap.read, frozenset({"slots"})),
    "npy": Format(npy.ABOUT, npy.read, frozenset({"slots"})),
    "ring": Format(ring.ABOUT, ring.read, frozenset({"slots"})),
    "pagemap": Format(pagemap.ABOUT, pagemap.read),
    "ftrace": Format(ftrace.ABOUT, ftrace.read, frozenset({"slots"})),
    "lackey": Format(lackey.ABOUT, lackey.read),
    "text": Format(text.ABOUT, text.read, frozenset({"slots", "addresses", "time_unit"})),
}
FOREIGN = {
    b"PK\x03\x04": "is a .npz or zip; spte show and spte profile take traces as they are",
    b"\x1f\x8b": "is compressed; convert what `zcat` makes of it: zcat FILE | spte convert - -o OUT.npz",
    b"\xfd7zXZ": "is compressed; convert what `xzcat` makes of it: xzcat FILE | spte convert - -o OUT.npz",
    b"\x28\xb5\x2f\xfd": "is compressed; convert what `zstdcat` makes of it: zstdcat FILE | spte convert - -o OUT.npz",
    b"\x17\x08\x44tracing": "is trace-cmd's own file; convert what `trace-cmd report FILE` prints",
    b"\x7fELF": "is a program or a core dump (ELF), no record of writes",
    b"PERFILE2": "is perf's own file; convert what `perf script -i FILE` prints",
}
TEXTS = {"lackey": lackey.looks_like, "ftrace": ftrace.looks_like, "text": text.looks_like}
ENOUGH = 8
"""Different words or entries that must all look like one format before chance is ruled out."""
TEXT = re.compile(rb"[\t\n\f\r\x1b -~\x80-\xff]*")


def choose(heads: Iterable[tuple[str, bytes, bool]]) -> str:
    """Return the format of all inputs together, given of each the name, the bytes that tell it, and whether they do.

    Raises
    ------
    TraceError
        If an input has no format that is known, two inputs differ, or the bytes fit more than one format.
    """
    possible = set(FORMATS)
    blank = True
    decided_by = ""
    for name, head, tells in heads:
        if not tells:
            raise TraceError(f"{name}: begins with {len(head)} zeros, as a bitmap, a ring and a pagemap can; say which with --format")
        kinds = _kinds(name, head)
        if not possible & kinds:
            raise TraceError(
                f"{name}: looks like {' or '.join(sorted(kinds))}, {decided_by} like {' or '.join(sorted(possible))}; convert each alone"
            )
        if not possible <= kinds:
            decided_by = name
        possible &= kinds
        blank &= not any(head)
    if len(possible) > 1 and not blank:
        raise TraceError(f"{decided_by}: can be {' or '.join(sorted(possible))} by its bytes; say which with --format")
    return "bitmap" if len(possible) > 1 else possible.pop()


def _kinds(name: str, head: bytes) -> set[str]:
    """Return the formats that an input can have."""
    if not head:
        raise TraceError(f"{name}: is empty")
    for magic, why in FOREIGN.items():
        if head.startswith(magic):
            raise TraceError(f"{name}: {why}")
    if npy.looks_like(head):
        return {"npy"}
    if head.isascii() and TEXT.fullmatch(head) and b"\n" not in head:
        raise TraceError(f"{name}: {shown(head)!r} is text without a newline: it was cut off; if it is a bitmap, say --format bitmap")
    if _is_text(head):
        for kind, looks_like in TEXTS.items():
            if looks_like(head):
                return {kind}
        lines = [line for line in head.split(b"\n") if line.strip() and not line.startswith(b"#")]
        raise TraceError(
            f"{name}: {shown(lines[0]) if lines else 'no line'!r} is no line of a text that this reads: {', '.join(TEXTS)}; "
            "see spte convert --help"
        )
    kinds = _raw_kinds(np.frombuffer(head[: len(head) // ring.ENTRY.itemsize * ring.ENTRY.itemsize], "<u8"))
    return kinds if len(head) % ring.ENTRY.itemsize == 0 else kinds - {"ring"} or {"bitmap"}


def _is_text(head: bytes) -> bool:
    try:
        # The head may end in the middle of a character.
        head[: head.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\n" in head and TEXT.fullmatch(head) is not None


def _raw_kinds(words: npt.NDArray[np.uint64]) -> set[str]:
    """Return which formats these words can be; any words can be a bitmap's, others rule that out by being many."""
    if not words.any():
        return {"bitmap", "ring", "pagemap"}
    entries = words.view(ring.ENTRY)
    valid = (entries["flags"] <= ring.DIRTY | ring.RESET) & (entries["slot"] < ring.MAX_SLOT) & (words[1::2] >> np.uint64(40) == 0)
    if valid.all():
        active = np.unique(entries[entries["flags"] != 0])
        return {"ring"} if len(np.unique(active["offset"])) >= ENOUGH else {"bitmap", "ring"}
    held = words & pagemap.PRESENT_OR_SWAPPED != 0
    if held.any() and not (words & pagemap.ALWAYS_ZERO).any() and not (words[~held] & pagemap.NEEDS_A_PAGE).any():
        dirty = held & (words & pagemap.SOFT_DIRTY != 0)
        return {"pagemap"} if dirty.any() and np.count_nonzero(held) >= ENOUGH else {"bitmap", "pagemap"}
    return {"bitmap"}
