"""Dumps of a dirty ring, one an epoch: entries of struct kvm_dirty_gfn (u32 flags, u32 slot, u64 offset)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spte.convert.source import Source
from spte.convert.writes import Writes
from spte.trace import TraceError

ABOUT = "dumps of a dirty ring (struct kvm_dirty_gfn)"
ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
DIRTY, RESET = 1, 2
"""KVM_DIRTY_GFN_F_DIRTY: to be collected; KVM_DIRTY_GFN_F_RESET: collected, waits for KVM_RESET_DIRTY_RINGS."""
MAX_SLOT = 1 << 17
"""Address spaces 0 and 1 of x86 above 16 bits of slot id."""
PIECE = 1 << 18


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the dirty entries of `sources` to `writes`; entries that were collected before belong to an earlier epoch."""
    dirty = collected = 0
    source = None
    for epoch, source in enumerate(sources):
        offset = 0
        writes.epoch(epoch, np.empty(0, np.uint64))
        while content := source.read(PIECE * ENTRY.itemsize):
            if len(content) % ENTRY.itemsize:
                raise source.error(
                    f"ends at offset {offset + len(content)}, within an entry of {ENTRY.itemsize} bytes: the dump was cut off"
                )
            entries = np.frombuffer(content, ENTRY)
            wrong = np.flatnonzero((entries["flags"] > (DIRTY | RESET)) | (entries["slot"] >= MAX_SLOT) | (entries["offset"] >> 40 != 0))
            if len(wrong):
                at, entry = int(wrong[0]), entries[wrong[0]]
                raise source.error(
                    f"offset {offset + at * ENTRY.itemsize}: flags {entry['flags']:#x}, slot {entry['slot']:#x}, offset "
                    f"{entry['offset']:#x} is no entry of a dirty ring"
                )
            mine = entries[entries["flags"] == DIRTY]
            dirty += len(mine)
            collected += int(np.count_nonzero(entries["flags"] & RESET))
            writes.epoch(epoch, _pages(source, writes, entries, offset))
            offset += len(content)
        if not offset:
            raise source.error("is empty")
    if source is not None and collected and not dirty:
        raise source.error(f"all {collected} entries were collected before (flags {RESET}); dump the ring before its entries are collected")
    if collected:
        writes.note(f"{collected} entries had been collected before the dump (flags {RESET}) and count in no epoch")


def _pages(source: Source, writes: Writes, entries: np.ndarray, offset: int) -> np.ndarray:
    rows = np.flatnonzero(entries["flags"] == DIRTY)

    def error(index: int, why: str) -> TraceError:
        return source.error(f"offset {offset + int(rows[index]) * ENTRY.itemsize}: the entry {why}")

    pages = writes.of_slot(entries["slot"][rows].astype(np.uint64), entries["offset"][rows], error)
    return writes.slots.place(pages)[0] if writes.slots else pages
