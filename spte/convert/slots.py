"""The guest's memslots, and the page space of a trace in which they lie one behind the other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from spte.convert.scan import Mask, Uint64Array
from spte.trace import MAX_NPAGES, PAGE_SIZE, PAGES_PER_2M, TraceError

MAX_ID = (1 << 32) - 1
AS_SHIFT = 16
"""A slot is named by its address space in the upper and its id in the lower 16 bits."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A memslot: `gpa` and `size` in bytes, multiples of 4096; `id` as KVM has it, None: its place among those given."""

    gpa: int
    size: int
    id: int | None = None


class Slots:
    """Memslots and where their pages lie in the trace.

    The slots lie there in the order of their addresses without the holes between them. Each begins at the next page that
    is as far into a 2 MiB region as the slot is in the guest, so that the same pages make up a 2 MiB region in both.

    Parameters
    ----------
    slots : sequence of Slot
        Which slots there are, in the order in which their bitmaps come.

    Raises
    ------
    TraceError
        If a slot is no whole number of pages, two overlap or have one id, or all are too large together.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.given = [dataclasses.replace(s, id=i if s.id is None else s.id) for i, s in enumerate(slots)]
        for slot in self.given:
            if slot.gpa < 0 or slot.gpa % PAGE_SIZE or slot.size <= 0 or slot.size % PAGE_SIZE or (slot.gpa + slot.size) >> 52:
                raise TraceError(
                    f"slot {slot.gpa:#x}:{slot.size:#x}: address and size must be multiples of {PAGE_SIZE} below 2^52, the size above 0"
                )
        ids = [slot.id for slot in self.given]
        twice = next((slot for slot in self.given if ids.count(slot.id) > 1), None)
        if twice is not None or any(not 0 <= (slot.id or 0) <= MAX_ID for slot in self.given):
            raise TraceError(f"slot ids {ids}: each is its own, from 0 to {MAX_ID}")
        ordered = sorted(self.given, key=lambda slot: slot.gpa)
        for low, high in itertools.pairwise(ordered):
            if low.gpa + low.size > high.gpa:
                raise TraceError(f"slot {low.gpa:#x}:{low.size:#x} overlaps the one at {high.gpa:#x}; KVM allows no overlap")
        self._base = np.array([slot.gpa // PAGE_SIZE for slot in ordered], np.int64)
        self._pages = np.array([slot.size // PAGE_SIZE for slot in ordered], np.int64)
        starts, end = [], 0
        for base, pages in zip(self._base.tolist(), self._pages.tolist(), strict=True):
            start = end + (base - end) % PAGES_PER_2M
            starts.append(start)
            end = start + pages
        if end > MAX_NPAGES - PAGES_PER_2M:
            raise TraceError(f"the slots have {end} pages; a trace has at most {MAX_NPAGES - PAGES_PER_2M}")
        self._starts = np.array(starts, np.int64)
        self._start_of_id: dict[int | None, int] = {slot.id: start for slot, start in zip(ordered, starts, strict=True)}
        self.npages = end

    def start(self, slot: Slot) -> int:
        """Return the page of the trace at which `slot` begins."""
        return self._start_of_id[slot.id]

    def by_id(self, slot_id: int) -> Slot | None:
        """Return the slot that KVM knows as `slot_id`, or None."""
        return next((slot for slot in self.given if slot.id == slot_id), None)

    def place(self, gfn: Uint64Array) -> tuple[Uint64Array, Mask]:
        """Return the page of the trace for each guest page of `gfn` that a slot holds, and which these are, bool."""
        at = gfn.astype(np.int64)
        slot = np.searchsorted(self._base, at, side="right") - 1
        offset = at - self._base[slot]
        inside = (slot >= 0) & (offset < self._pages[slot])
        return (self._starts[slot] + offset)[inside].astype(np.uint64), inside

    def describe(self) -> list[dict[str, Any]]:
        """Return id, address, size and first page of each slot, for the trace's `meta`."""
        return [{"id": s.id, "gpa": s.gpa, "size": s.size, "page": self.start(s)} for s in self.given]
