"""Memslots of one VM: the sorted tables that kernels search, bitmaps and lpage counters from pools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spte.arrays import reserve as memory
from spte.arrays.records import U64s
from spte.arrays.reserve import Pool
from spte.arrays.slots import BEGAN_SET, KVM_MEMORY_SLOT, KVM_MEMSLOTS, LOG_DIRTY_PAGES, PTE_LIST_DESC, READONLY, UNARMED, Slots
from spte.errors import SlotIdError
from spte.host.backing import Backing
from spte.mmu.memslot import find_slot
from spte.observe.listing import bit_runs, runs_of

ADDRESS_SPACES = 2
MAX_PAGES = (1 << 31) - 1
VALID_FLAGS = LOG_DIRTY_PAGES | READONLY
_ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def check_slot_number(slot: int, user_mem_slots: int) -> None:
    """Refuse ids and address spaces that a VM does not have."""
    as_id, number = slot >> 16, slot & 0xFFFF
    if number >= user_mem_slots:
        raise SlotIdError(f"slot={slot:#x}: id {number} is not below {user_mem_slots}")
    if not 0 <= as_id < ADDRESS_SPACES:
        raise SlotIdError(f"slot={slot:#x}: address space {as_id} (bits 31:16) is not 0 or 1")


@dataclass(slots=True, eq=False)
class Memslot:
    """One memslot: guest range, host address, flags, where its bitmap and counters lie in the pools."""

    slot: int  # as_id << 16 | id
    base_gfn: int
    npages: int
    flags: int
    hva: int
    backings: tuple[Backing, ...]  # the memory at its host addresses when it was made; it stays as long as the slot
    bitmap: int = -1
    lpage: tuple[int, int] = (0, 0)
    rmaps: tuple[int, ...] = (-1, -1, -1)
    began_set: bool = False  # logging began with every bit set
    unarmed: bool = False  # and initially-set was turned off since
    row: int = -1  # its row in the kernels' table, as of `changes` of the memslots
    changes: int = -1

    @property
    def as_id(self) -> int:
        """Address space: 0, or 1 for SMM."""
        return self.slot >> 16

    @property
    def end_gfn(self) -> int:
        """First gfn behind the slot."""
        return self.base_gfn + self.npages

    @property
    def words(self) -> int:
        """64-bit words of the slot's bitmap."""
        return (self.npages + 63) // 64

    def hpage_of(self, gfn: int) -> int:
        """Return the host page number of page `gfn` of the slot: __gfn_to_hva_memslot."""
        return (self.hva >> 12) + gfn - self.base_gfn

    @property
    def logs(self) -> bool:
        """LOG_DIRTY_PAGES is set."""
        return bool(self.flags & LOG_DIRTY_PAGES)

    def lpage_count(self, level: int) -> int:
        """Return how many regions of `level` the slot touches."""
        shift = 9 * (level - 1)
        return ((self.end_gfn - 1) >> shift) - (self.base_gfn >> shift) + 1


class Memslots:
    """All memslots of a VM, by address space.

    Mutating methods keep the kernels' tables in step; they check nothing: that is the VM's part.
    """

    def __init__(self, user_mem_slots: int, *, gpa_limit: bool, rmaps: bool = False) -> None:
        self.user_mem_slots = user_mem_slots  # of an address space; ids above are KVM's own
        self.gpa_limit = gpa_limit  # no slot lies beyond what the guest can address; else one may, all of it
        self._rmaps = rmaps
        self._heads = Pool(np.int64, 1 << 33)
        nodes = memory.reserve(PTE_LIST_DESC, 1 << 28)
        self._words = Pool(np.uint64, 1 << 30)
        self._disallow = Pool(np.int32, 1 << 27)
        pools = self._words.array, self._disallow.array, self._heads.array, nodes
        self.spaces = [Slots(memory.reserve(KVM_MEMORY_SLOT, 1 << 15), np.zeros(1, KVM_MEMSLOTS), *pools) for _ in range(ADDRESS_SPACES)]
        self._by_id: dict[int, Memslot] = {}
        self._changes = 0  # how often a slot came or went

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._by_id.values())

    def find(self, slot: int) -> Memslot | None:
        """Return the memslot with number ``as_id << 16 | id``."""
        return self._by_id.get(slot)

    def at(self, gfn: int, as_id: int = 0) -> Memslot | None:
        """Return the memslot that holds `gfn`: gfn_to_memslot."""
        s = self.spaces[as_id]
        k = int(find_slot(s, np.int64(gfn)))
        return self._by_id[int(s.slots["id"][k])] if k >= 0 else None

    def row_of(self, slot: Memslot) -> tuple[Slots, int]:
        """Return the kernels' table of the slot's address space and the slot's row in it."""
        s = self.spaces[slot.slot >> 16]
        if slot.changes != self._changes:
            slot.row = int(np.searchsorted(s.slots["base_gfn"][: s.memslots[0].used_slots], slot.base_gfn))
            slot.changes = self._changes
        return s, slot.row

    def mapping(self, hpage: int, count: int) -> Iterator[tuple[Memslot, int, int]]:
        """Yield ``(slot, start gfn, end gfn)`` of what slots map of host pages ``[hpage, hpage + count)``: kvm_handle_hva_range."""
        for slot in self:
            first = slot.hva >> 12
            start, end = max(hpage, first), min(hpage + count, first + slot.npages)
            if start < end:
                yield slot, start - first + slot.base_gfn, end - first + slot.base_gfn

    def overlapping(self, as_id: int, start: int, end: int, but: int) -> Memslot | None:
        """Return a memslot of `as_id` other than number `but` that meets gfns ``[start, end)``."""
        s = self.spaces[as_id]
        slots = s.slots[: s.memslots[0].used_slots]
        at = int(np.searchsorted(slots["base_gfn"], end))
        while at > 0:
            at -= 1
            if slots[at].base_gfn + slots[at].npages <= start:
                return None
            if slots[at].id != but:
                return self._by_id[int(slots[at].id)]
        return None

    def insert(self, slot: Memslot) -> None:
        """Add `slot`: counters of levels 2 and 3 set as its alignment asks."""
        if self._rmaps:
            self._take_rmaps([slot])
        offsets = []
        for level in (2, 3):
            pages = 1 << (9 * (level - 1))
            count = slot.lpage_count(level)
            offset = self._disallow.take(count)
            entries = self._disallow.array[offset : offset + count]
            if (slot.base_gfn ^ (slot.hva >> 12)) % pages:
                entries[:] = 1
            else:
                if slot.base_gfn % pages:
                    entries[0] = 1
                if slot.end_gfn % pages:
                    entries[-1] = 1
            offsets.append(offset)
        slot.lpage = (offsets[0], offsets[1])
        s = self.spaces[slot.as_id]
        n = int(s.memslots[0].used_slots)
        at = int(np.searchsorted(s.slots["base_gfn"][:n], slot.base_gfn))
        s.slots[at + 1 : n + 1] = s.slots[at:n]
        s.memslots[0].used_slots = n + 1
        self._changes += 1
        self._by_id[slot.slot] = slot
        self._fill(s, at, slot)

    def remove(self, slot: Memslot) -> None:
        """Take `slot` out; its counters return to the pool, its bitmap stays with it."""
        s, at = self.row_of(slot)
        n = int(s.memslots[0].used_slots)
        s.slots[at : n - 1] = s.slots[at + 1 : n]
        s.memslots[0].used_slots = n - 1
        self._changes += 1
        del self._by_id[slot.slot]
        for level, offset in zip((2, 3), slot.lpage, strict=True):
            self._disallow.give(offset, slot.lpage_count(level))
        if self._rmaps:
            for level, offset in zip((1, 2, 3), slot.rmaps, strict=True):
                self._heads.give(offset, slot.lpage_count(level))

    def update(self, slot: Memslot) -> None:
        """Bring the kernels' row of `slot` in step with its flags and bitmap."""
        s, at = self.row_of(slot)
        self._fill(s, at, slot)

    @staticmethod
    def _fill(s: Slots, at: int, slot: Memslot) -> None:
        flags = slot.flags | BEGAN_SET * slot.began_set | UNARMED * slot.unarmed
        row = s.slots[at]
        row.base_gfn, row.npages, row.flags, row.id = slot.base_gfn, slot.npages, flags, slot.slot
        row.hpage, row.dirty_bitmap, row.lpage_info, row.rmap = slot.hva >> 12, slot.bitmap, slot.lpage, slot.rmaps

    def allocate_bitmap(self, slot: Memslot, *, all_set: bool) -> None:
        """Give `slot` a bitmap and its scratch half, all 0, or all ones for exactly its pages."""
        slot.bitmap = self._words.take(2 * slot.words)
        slot.began_set, slot.unarmed = all_set, False
        if all_set:
            live = self.bitmap(slot)
            live[:] = _ALL_ONES
            if slot.npages % 64:
                live[-1] = (np.uint64(1) << np.uint64(slot.npages % 64)) - np.uint64(1)

    def leave_initially_set(self) -> None:
        """Note in each slot that began to log initially-set that CLEAR no longer arms its huge leaves."""
        for slot in self:
            slot.unarmed = slot.began_set
            self.update(slot)

    def free_bitmap(self, slot: Memslot) -> None:
        """Take the bitmap of `slot` away, if it has one."""
        if slot.bitmap >= 0:
            self._words.give(slot.bitmap, 2 * slot.words)
            slot.bitmap = -1

    def free_bitmaps(self) -> None:
        """Take every bitmap away: with rings nothing is marked there any more, and nobody can read them."""
        for slot in self:
            self.free_bitmap(slot)
            self.update(slot)

    def bitmap(self, slot: Memslot) -> U64s:
        """Return a view of the live bitmap of `slot`."""
        return self._words.array[slot.bitmap : slot.bitmap + slot.words]

    def scratch(self, slot: Memslot) -> U64s:
        """Return a view of the scratch half of `slot`: snapshot of GET, input of CLEAR."""
        return self._words.array[slot.bitmap + slot.words : slot.bitmap + 2 * slot.words]

    def disallow(self, slot: Memslot, level: int) -> list[int]:
        """Return the lpage counters of `slot` at `level` 2 or 3."""
        offset = slot.lpage[level - 2]
        return [int(x) for x in self._disallow.array[offset : offset + slot.lpage_count(level)]]

    def _take_rmaps(self, slots: list[Memslot]) -> None:
        taken = self._heads.take_all([slot.lpage_count(level) for slot in slots for level in (1, 2, 3)])
        for n, slot in enumerate(slots):
            slot.rmaps = tuple(taken[3 * n : 3 * n + 3])

    def allocate_rmaps(self) -> None:
        """Give every slot, and those to come, rmaps; OutOfTablesError (ENOMEM), and none has any, if there is no room."""
        slots = [slot for slot in self if not self.has_rmaps(slot)]
        self._take_rmaps(slots)
        self._rmaps = True
        for slot in slots:
            self.update(slot)

    @staticmethod
    def has_rmaps(slot: Memslot) -> bool:
        """Tell whether `slot` has rmaps."""
        return slot.rmaps[0] >= 0

    def clear_rmaps(self) -> None:
        """Forget every SPTE, after all were dropped."""
        for slot in self:
            for level, offset in zip((1, 2, 3), slot.rmaps, strict=True):
                if offset >= 0:
                    self._heads.array[offset : offset + slot.lpage_count(level)] = 0
        self.spaces[0].nodes[:1] = 0

    def records(self) -> list[dict[str, Any]]:
        """Return every memslot in the recordings' shape: numbers, lpage counters and dirty bitmap as runs."""
        return [
            {
                "as": slot.as_id, "id": slot.slot & 0xFFFF, "base_gfn": slot.base_gfn, "npages": slot.npages, "flags": slot.flags,
                "disallow_l2": runs_of(self.disallow(slot, 2)), "disallow_l3": runs_of(self.disallow(slot, 3)),
                "kbitmap": bit_runs(self.bitmap(slot)) if slot.bitmap >= 0 else None,
            }
            for slot in self
        ]  # fmt: skip

    def advance_generation(self, as_id: int, step: int) -> int:
        """Move the generation of an address space on, so that older MMIO SPTEs are stale; returns the new one."""
        memslots = self.spaces[as_id].memslots[0]
        memslots.generation += step
        return int(memslots.generation)
