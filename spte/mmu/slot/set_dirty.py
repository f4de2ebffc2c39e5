"""Set dirty: up to 5.11, disabling on PML hardware sets D everywhere in the slot, so that nothing more is logged (patch 12 drops it)."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.bits import MMU_PRESENT, ONE, TYPE_DISABLED, TYPE_MASK, WRITABLE, ZERO, is_leaf
from spte.mmu.slot.sweep import GFN_SHIFT, is_indirect, place


@kernel
def set_dirty_slot(t, mode, as_id, start, end, rewrites):
    """Set D in every entry that maps gfns ``[start, end)`` or, in the TDP MMU, leads to them: KVM's kvm_mmu_slot_set_dirty.

    With `rewrites` the TDP MMU writes those again that have D. The shadow MMU flushes for leaves that a fast fault could make writable.
    Returns SPTEs written, and whether to flush.
    """
    m = mode[0]
    written, flush = 0, False
    dirty = ONE << m.lay.dirty_shift
    mendable = m.lay.host_writable | m.lay.mmu_writable
    for row in range(t.kvm[0].rows):
        if t.pages[row].level == 0:
            continue
        lo, hi = place(t, row, as_id, start, end)
        indirect = is_indirect(t, row)
        if indirect:
            lo, hi = 0, 512
        for i in range(lo, hi):
            spte = t.sptes[row, i]
            wanted = (spte & MMU_PRESENT) != ZERO
            if t.pages[row].shadow:
                wanted = is_leaf(spte, t.pages[row].level) and (spte & TYPE_MASK) != TYPE_DISABLED
            if indirect and not start <= np.int64(t.shadowed[row, i] >> GFN_SHIFT) < end:
                continue
            if not wanted:
                continue
            if t.pages[row].shadow:
                flush = flush or (spte & (mendable | WRITABLE)) == mendable
            if (spte & dirty) == ZERO or (rewrites and t.pages[row].shadow == 0):
                t.sptes[row, i] = spte | dirty
                written += 1
                flush = flush or t.pages[row].shadow == 0
    return written, flush
