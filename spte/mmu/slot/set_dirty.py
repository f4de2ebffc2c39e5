"""Set dirty: up to 5.11, disabling on PML hardware sets D everywhere in the slot, so that nothing more is logged (patch 12 drops it)."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.bits import MMU_PRESENT, ONE, ZERO, is_leaf
from spte.mmu.slot.sweep import GFN_SHIFT, is_indirect, place


@kernel
def set_dirty_slot(t, mode, as_id, start, end):
    """Set D in every present entry, links too, that maps or leads to gfns ``[start, end)``: KVM's kvm_mmu_slot_set_dirty.

    Returns SPTEs changed; the caller flushes if it is not 0.
    """
    m = mode[0]
    changed = 0
    dirty = ONE << m.lay.dirty_shift
    for row in range(t.kvm[0].rows):
        if t.pages[row].level == 0:
            continue
        lo, hi = place(t, row, as_id, start, end)
        indirect = is_indirect(t, row)
        if indirect:
            lo, hi = 0, 512
        for i in range(lo, hi):
            spte = t.sptes[row, i]
            wanted = is_leaf(spte, t.pages[row].level) if t.pages[row].shadow else (spte & MMU_PRESENT) != ZERO
            if indirect and not start <= np.int64(t.shadowed[row, i] >> GFN_SHIFT) < end:
                continue
            if wanted and (spte & dirty) == ZERO:
                t.sptes[row, i] = spte | dirty
                changed += 1
    return changed
