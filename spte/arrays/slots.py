"""The memslots of one address space, one record a slot, and the pools that they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.arrays.records import I64s, Records, U64s, columns, record

LOG_DIRTY_PAGES, READONLY = 1, 2
BEGAN_SET = 1 << 17  # internal: logging began with every bit set, so huge leaves may be writable until CLEAR
UNARMED = 1 << 18  # internal: and initially-set was turned off since, so that CLEAR passes over them: KVM may lose writes

KVM_MEMORY_SLOT = record("kvm_memory_slot", [
    *columns("i8", "base_gfn", "npages", "flags"),
    ("id", "i8"),  # as_id << 16 | id
    ("hpage", "i8"),  # host page number of the first page: userspace_addr >> 12
    ("dirty_bitmap", "i8"),  # its first word in `words`, -1: none
    ("lpage_info", "i8", (2,)),  # first counter of level 2 and of level 3 in `disallow_lpage`
    ("rmap", "i8", (3,)),  # first head of level 1, 2, 3 in `rmaps`, -1: none
])  # fmt: skip

KVM_MEMSLOTS = record("kvm_memslots", columns("i8", "used_slots", "last_used_slot", "generation"))

# A link of a chain of SPTEs. Number 0 is none: its fields are the highest number that was ever taken and the first free one.
PTE_LIST_DESC = record("pte_list_desc", columns("i8", "spte", "more"))


class Slots(NamedTuple):
    """Memslots of one address space, ascending by base gfn."""

    slots: Records  # [slots] KVM_MEMORY_SLOT
    memslots: Records  # [1] KVM_MEMSLOTS
    words: U64s  # pool of dirty bitmaps, [live | scratch] a slot
    disallow_lpage: npt.NDArray[np.int32]  # pool of counters: regions with one that is not 0 have no huge leaf
    rmaps: I64s  # pool of rmap heads
    nodes: Records  # PTE_LIST_DESC: rmaps with more than one SPTE
