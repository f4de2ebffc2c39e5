"""Write-protect the leaves of a slot: KVM's kvm_mmu_slot_remove_write_access. The caller must flush."""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.bits import W_SHIFT
from spte.kernels._write_protect import protect_entries
from spte.mmu.slot.sweep import clear_scattered, is_scattered, place


@kernel
def write_protect_slot(t, as_id, start, end, min_level):
    """Take W from the leaves of level >= `min_level` that map gfns ``[start, end)``, rows in arena order; returns SPTEs changed."""
    changed = 0
    for row in range(t.kvm[0].rows):
        if t.pages[row].level >= min_level and is_scattered(t, row):
            changed += clear_scattered(t, row, as_id, start, end, W_SHIFT)
        elif t.pages[row].level >= min_level:
            lo, hi = place(t, row, as_id, start, end)
            if lo < hi:
                changed += protect_entries(t.sptes, row, lo, hi, t.pages[row].level > 1)
    return changed
