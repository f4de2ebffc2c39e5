"""Write-protect the leaves of a slot: KVM's kvm_mmu_slot_remove_write_access. The caller must flush.

Tables are swept in the order of the arena.
"""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.bits import W_SHIFT, WRITABLE, ZERO, is_leaf
from spte.kernels._entries import clear_entries
from spte.mmu.slot.sweep import clear_indirect, is_indirect, place


@kernel
def write_protect_slot(t, as_id, start, end, min_level, tdp_level):
    """Take W from the leaves of level >= `min_level` that map gfns ``[start, end)``: KVM's kvm_mmu_slot_remove_write_access.

    In the TDP MMU `tdp_level` is the lowest. Returns SPTEs changed.
    """
    changed = 0
    for row in range(t.kvm[0].rows):
        least = min_level if t.pages[row].shadow else tdp_level
        if t.pages[row].level >= least and is_indirect(t, row):
            changed += clear_indirect(t, row, as_id, start, end, W_SHIFT)
        elif t.pages[row].level >= least:
            lo, hi = place(t, row, as_id, start, end)
            if lo < hi:
                changed += clear_entries(t.flat, row * 512 + lo, row * 512 + hi, W_SHIFT, W_SHIFT, t.pages[row].level > 1, False)
    return changed


@kernel
def count_protected(t, as_id, start, end, min_level):
    """Count the TDP MMU's leaves of level >= `min_level` for gfns ``[start, end)`` that have no W: old kernels write them again."""
    count = 0
    for row in range(t.kvm[0].rows):
        if t.pages[row].level >= min_level and t.pages[row].shadow == 0:
            lo, hi = place(t, row, as_id, start, end)
            for i in range(lo, hi):
                spte = t.sptes[row, i]
                count += is_leaf(spte, t.pages[row].level) and (spte & WRITABLE) == ZERO
    return count
