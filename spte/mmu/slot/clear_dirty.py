"""Clear the logging bit of a slot's leaves: KVM's kvm_mmu_slot_leaf_clear_dirty.

The caller must flush: a TLB that caches D=1 logs nothing.
"""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.kernels._clear_dirty import clear_entries
from spte.mmu.slot.sweep import clear_scattered, is_scattered, place
from spte.mmu.tdp_mmu import log_shift


@kernel
def clear_dirty_slot(t, mode, as_id, start, end):
    """Clear the logging bit of every leaf that maps gfns ``[start, end)``, rows in arena order; returns SPTEs changed."""
    m = mode[0]
    changed = 0
    for row in range(t.kvm[0].rows):
        if t.pages[row].level > 0 and not (t.pages[row].shadow and t.pages[row].level > 1):  # the shadow MMU clears D at 4 KiB only
            if is_scattered(t, row):
                changed += clear_scattered(t, row, as_id, start, end, log_shift(t, m, row))
                continue
            lo, hi = place(t, row, as_id, start, end)
            if lo < hi:
                changed += clear_entries(t.sptes, row, lo, hi, log_shift(t, m, row), t.pages[row].level > 1)
    return changed
