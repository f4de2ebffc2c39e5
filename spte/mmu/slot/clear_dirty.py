"""Clear the logging bit of a slot's leaves: KVM's kvm_mmu_slot_leaf_clear_dirty.

Tables are swept in the order of the arena. The caller must flush: a TLB that caches D=1 logs nothing.
"""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.kernels._entries import clear_entries
from spte.mmu.slot.sweep import clear_indirect, is_indirect, place
from spte.mmu.tdp_mmu import log_shift


@kernel
def clear_dirty_slot(t, mode, as_id, start, end):
    """Clear the logging bit of every leaf that maps gfns ``[start, end)``: KVM's kvm_mmu_slot_leaf_clear_dirty. Returns SPTEs changed."""
    m = mode[0]
    changed = 0
    for row in range(t.kvm[0].rows):
        if t.pages[row].level > 0 and not (t.pages[row].shadow and t.pages[row].level > 1):  # the shadow MMU clears D at 4 KiB only
            shift = log_shift(t, m, row)
            if is_indirect(t, row):
                changed += clear_indirect(t, row, as_id, start, end, shift)
                continue
            lo, hi = place(t, row, as_id, start, end)
            if lo < hi:
                changed += clear_entries(t.flat, row * 512 + lo, row * 512 + hi, shift, shift, t.pages[row].level > 1, False)
    return changed
