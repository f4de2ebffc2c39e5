"""Snapshots of /proc/PID/pagemap, one an epoch: bit 55 says that a page was written since clear_refs was written 4.

Every snapshot is of the same address range; its first page is page 0 of the trace.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spte.convert.source import Source
from spte.convert.writes import Writes

ABOUT = "snapshots of /proc/PID/pagemap with soft-dirty bits"
SOFT_DIRTY = np.uint64(1 << 55)
PRESENT_OR_SWAPPED = np.uint64(3 << 62)
ALWAYS_ZERO = np.uint64(3 << 59)
"""No kernel has given these bits a meaning (58 marks guard regions from 6.15 on)."""
NEEDS_A_PAGE = np.uint64((1 << 55) - 1)
"""Frame number, or swap type and offset: zero where no page is present or swapped."""
WORD = 8
PIECE = 1 << 19


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the soft-dirty pages of `sources` to `writes`."""
    first: tuple[str, int] | None = None
    dirty = 0
    source = None
    for epoch, source in enumerate(sources):
        writes.epoch(epoch, np.empty(0, np.uint64))
        offset = 0
        while content := source.read(PIECE * WORD):
            if len(content) % WORD:
                raise source.error(f"ends at offset {offset + len(content)}, within an entry of {WORD} bytes: it was cut off")
            entries = np.frombuffer(content, "<u8")
            wrong = np.flatnonzero(entries & ALWAYS_ZERO)
            if len(wrong):
                raise source.error(f"offset {offset + int(wrong[0]) * WORD}: {int(entries[wrong[0]]):#018x} is no entry of a pagemap")
            pages = np.flatnonzero(entries & SOFT_DIRTY).astype(np.uint64)
            dirty += len(pages)
            writes.epoch(epoch, pages + np.uint64(offset // WORD))
            offset += len(content)
        first = first or (source.name, offset)
        if offset != first[1]:
            raise source.error(f"has {offset} bytes and {first[0]} {first[1]}: snapshots are of one address range; or it was cut off")
        if not offset:
            raise source.error("is empty")
        writes.space(offset // WORD)
    if source is not None and not dirty:
        raise source.error("no entry of any snapshot has the soft-dirty bit (55): is the kernel built with CONFIG_MEM_SOFT_DIRTY?")
