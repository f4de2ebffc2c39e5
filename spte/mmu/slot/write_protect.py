"""Write-protect the leaves of a slot: KVM's kvm_mmu_slot_remove_write_access. The caller must flush.

Tables are swept in the order of the arena.
"""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.bits import W_SHIFT
from spte.kernels._entries import clear_entries
from spte.mmu.slot.sweep import clear_indirect, is_indirect, place


@kernel
def write_protect_slot(t, as_id, start, end, min_level):
    """Take W from the leaves of level >= `min_level` that map gfns ``[start, end)``: KVM's kvm_mmu_slot_remove_write_access.

    Returns SPTEs changed.
    """
    changed = 0
    for row in range(t.kvm[0].rows):
        if t.pages[row].level >= min_level and is_indirect(t, row):
            changed += clear_indirect(t, row, as_id, start, end, W_SHIFT)
        elif t.pages[row].level >= min_level:
            lo, hi = place(t, row, as_id, start, end)
            if lo < hi:
                changed += clear_entries(t.flat, row * 512 + lo, row * 512 + hi, W_SHIFT, W_SHIFT, t.pages[row].level > 1)
    return changed
