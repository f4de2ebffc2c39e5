"""Set dirty: up to 5.11, disabling on PML hardware sets D everywhere in the slot, so that nothing more is logged (patch 12 drops it)."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
<<<<<<< f72c9dbc1784c216e756c4aa38cac6e8a1ec11cc
from spte.bits import MMU_PRESENT, ONE, ZERO, is_leaf
from spte.mmu.slot.sweep import GFN_SHIFT, is_indirect, place


@kernel
def set_dirty_slot(t, mode, as_id, start, end):
    """Set D in every present entry, links too, that maps or leads to gfns ``[start, end)``: KVM's kvm_mmu_slot_set_dirty.

    Returns SPTEs changed; the caller flushes if it is not 0.
=======
from spte.bits import MMU_PRESENT, ONE, TYPE_DISABLED, TYPE_MASK, WRITABLE, ZERO, is_leaf
from spte.mmu.slot.sweep import GFN_SHIFT, is_scattered, place


@kernel
def set_dirty_slot(t, mode, as_id, start, end, rewrites):
    """Set D in every entry that maps gfns ``[start, end)`` or, in the TDP MMU, leads to them; returns SPTEs written, and whether to flush.

    With `rewrites` the TDP MMU writes those again that have D. The shadow MMU flushes for leaves that a fast fault could make writable.
>>>>>>> 9da19d85d5939b403bf8a236c475c63f4abda36e
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
<<<<<<< f72c9dbc1784c216e756c4aa38cac6e8a1ec11cc
            wanted = is_leaf(spte, t.pages[row].level) if t.pages[row].shadow else (spte & MMU_PRESENT) != ZERO
            if indirect and not start <= np.int64(t.shadowed[row, i] >> GFN_SHIFT) < end:
=======
            wanted = (spte & MMU_PRESENT) != ZERO
            if t.pages[row].shadow:
                wanted = is_leaf(spte, t.pages[row].level) and (spte & TYPE_MASK) != TYPE_DISABLED
            if scattered and not start <= np.int64(t.shadowed[row, i] >> GFN_SHIFT) < end:
>>>>>>> 9da19d85d5939b403bf8a236c475c63f4abda36e
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
