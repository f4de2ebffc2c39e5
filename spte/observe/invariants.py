"""The invariants of tables, counters and logging state, scanned in one pass over the arena.

| name | holds after every operation |
|---|---|
| S1 | of a leaf: MMU_WRITABLE only with HOST_WRITABLE, W only with MMU_WRITABLE |
| S3 | no LARGE at level 1, no leaf above level 3, frames of large leaves aligned |
| S4 | a leaf lies in a slot; a table's first gfn and parent are those of the entry that links to it |
| S5 | no frozen entry; no MMU_PRESENT in what is not present |
| S7 | the A/D type of a leaf is that of its root |
| S9 | pages_4k, pages_2m, pages_1g count the leaves; a table held for whole has 512 |
| S10 | no executable huge leaf under the NX mitigation |
| L1 | a slot that logs has no writable huge leaf, unless it began initially-set |
| L2 | by write protection: a writable 4 KiB leaf of a logging slot has its dirty bit set, unless initially-set was turned off since |
| L3 | with PML: a leaf with W and D of a logging slot has its dirty bit set, unless as L2 |
| M2 | the count of logging slots is that of the slots |
| M3 | a PML buffer is empty outside the guest |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spte import bits as bt
from spte._numba.jit import helper, kernel
from spte.arrays.mode import Modes
from spte.arrays.slots import BEGAN_SET, LOG_DIRTY_PAGES, READONLY, UNARMED, Slots
from spte.arrays.tables import PAE_ROOT, Tables
from spte.arrays.vcpu import Vcpu
from spte.bits import child_of, is_leaf
from spte.errors import InvariantError
from spte.mmu.make_spte import type_of
from spte.mmu.memslot import find_slot
from spte.mmu.page_track import is_direct
from spte.mmu.rmap import next_of, ref_of
from spte.mmu.shadow.page import entry_gfn
from spte.mmu.tdp_mmu import log_shift

S1, S3, S4, S5, S7, S9, S10, L1, L2, L3 = range(1, 11)
NAMES = ("", "S1", "S3", "S4", "S5", "S7", "S9", "S10", "L1", "L2", "L3")


@helper
def _leaf_breaks(t, s, m, row, spte, gfn, level):
    """Return the invariant that a present leaf breaks, 0 if none."""
    host = (spte & m.lay.host_writable) != bt.ZERO
    mmu = (spte & m.lay.mmu_writable) != bt.ZERO
    w = (spte & bt.WRITABLE) != bt.ZERO
    if (mmu and not host) or (w and not mmu):
        return S1
    below = (bt.ONE << (bt.SHIFT_PAGE + bt.U64(9 * (level - 1)))) - bt.ONE
    if level > 3 or (spte & bt.PFN_MASK & below) != bt.ZERO:
        return S3
    role = np.int64(t.pages[row].role)
    if (spte & bt.TYPE_MASK) != type_of(m, role):
        return S7
    if m.nx and level > 1 and (spte & (m.lay.x | m.lay.nx)) == m.lay.x:
        return S10
    k = find_slot(s, gfn)
    if k < 0:
        return S4
    flags = s.slots[k].flags
    if not flags & LOG_DIRTY_PAGES or flags & READONLY or s.slots[k].dirty_bitmap < 0 or not w:
        return 0
    if level > 1:
        return 0 if flags & BEGAN_SET else L1
    if flags & UNARMED:
        return 0
    page = gfn - s.slots[k].base_gfn
    marked = (s.words[s.slots[k].dirty_bitmap + (page >> 6)] >> bt.U64(page & 63)) & bt.U64(1)
    shift = log_shift(t, m, row)
    if marked == bt.ZERO and ((spte >> shift) & bt.U64(1)) != bt.ZERO:
        return L2 if shift == bt.U64(1) else L3
    return 0


@helper
def linked(t, s, page, ref):
    """Tell whether page `page` knows that entry `ref` links to it."""
    head = t.pages[page].parent_ptes
    while head != 0 and ref_of(s, head) != ref:
        head = next_of(s, head)
    return head != 0


@kernel
def _scan(t, spaces, mode, count):
    """Scan every table, its leaves against the memslots of its address space.

    Returns ``(invariant or 0, row, index)`` and fills the leaves of each level into `count`.
    """
    m = mode[0]
    for row in range(t.kvm[0].rows):
        level = np.int64(t.pages[row].level)
        if level == 0 or t.pages[row].shadow == PAE_ROOT:
            continue
        s = spaces[1] if np.int64(t.pages[row].role) >> bt.ROLE_SMM_SHIFT else spaces[0]
        for i in range(512):
            spte = t.sptes[row, i]
            if spte == m.lay.nonpresent and not t.pages[row].full:
                continue
            if (spte & bt.MMU_PRESENT) == bt.ZERO:
                mmio = (spte & m.lay.mmio_mask) == m.lay.mmio_test
                broken = S9 if t.pages[row].full else 0 if mmio else S5
            elif is_leaf(spte, level):
                if level <= 3:
                    count[level - 1] += 1
                gfn = entry_gfn(t, row, np.int64(i))
                broken = S3 if level == 1 and (spte & bt.LARGE) != bt.ZERO else _leaf_breaks(t, s, m, row, spte, gfn, level)
            else:
                child, gfn = child_of(spte), entry_gfn(t, row, np.int64(i))
                ours = linked(t, s, child, row * 512 + i)
                # A page that shadows a guest table has the gfn of that table, not of what is mapped below it.
                same = t.pages[child].gfn == gfn or not is_direct(t, child) or not is_direct(t, row)
                broken = 0 if ours and same and t.pages[child].level == level - 1 else S4
            if broken:
                return broken, row, i
    return 0, 0, 0


def check(t: Tables, spaces: Sequence[Slots], m: Modes, vcpus: Sequence[Vcpu], nr_memslots_dirty_logging: int) -> None:
    """Raise InvariantError for the first invariant that does not hold.

    Parameters
    ----------
    t : Tables
        The arena.
    spaces : sequence of Slots
        Memslots by address space.
    m : Modes
        Of a vCPU that runs L1.
    vcpus : sequence of Vcpu
        None of them in the guest.
    nr_memslots_dirty_logging : int
        How many slots the VM counts as logging.

    Raises
    ------
    InvariantError
        Names the invariant and the entry.
    """
    count = np.zeros(3, np.int64)
    broken, row, i = _scan(t, tuple(spaces), m, count)
    if broken:
        where = f"entry {i} of table {row}: level {t.pages[row].level}, first gfn {t.pages[row].gfn:#x}, value {t.sptes[row, i]:#x}"
        raise InvariantError(f"{NAMES[broken]} broken by {where}")
    counted = t.kvm[0].pages
    if (counted != count).any():
        raise InvariantError(f"S9 broken: pages_4k, _2m, _1g are {counted.tolist()}, the tables hold {count.tolist()} leaves")
    logging = sum(int((s.slots["flags"][: s.memslots[0].used_slots] & LOG_DIRTY_PAGES != 0).sum()) for s in spaces)
    if logging != nr_memslots_dirty_logging:
        raise InvariantError(f"M2 broken: {nr_memslots_dirty_logging} slots counted as logging, {logging} do")
    for index, v in enumerate(vcpus):
        if v.vcpu[0].pml_index != 511:
            raise InvariantError(f"M3 broken: vCPU {index} is outside the guest with PML index {v.vcpu[0].pml_index}")
