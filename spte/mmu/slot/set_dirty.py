"""Set dirty: up to 5.11, disabling on PML hardware sets D everywhere in the slot, so that nothing more is logged (patch 12 drops it)."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.arrays.context import ROWS
from spte.bits import MMU_PRESENT, ONE, TYPE_DISABLED, TYPE_MASK, WRITABLE, ZERO
from spte.mmu.slot.sweep import GFN_SHIFT, is_scattered, place
from spte.mmu.walk import is_leaf


@kernel
def set_dirty_slot(t, m, as_id, start, end, rewrites):
    """Set D in every entry that maps gfns ``[start, end)`` or, in the TDP MMU, leads to them; returns SPTEs written, and whether to flush.

    With `rewrites` the TDP MMU writes those again that have D. The shadow MMU flushes for leaves that a fast fault could make writable.
    """
    written, flush = 0, False
    dirty = ONE << m.lay.dirty_shift
    mendable = m.lay.host_writable | m.lay.mmu_writable
    for row in range(t.meta[ROWS]):
        if t.level[row] == 0:
            continue
        lo, hi = place(t, row, as_id, start, end)
        scattered = is_scattered(t, row)
        if scattered:
            lo, hi = 0, 512
        for i in range(lo, hi):
            spte = t.sptes[row, i]
            wanted = (spte & MMU_PRESENT) != ZERO
            if t.shadow[row]:
                wanted = is_leaf(spte, t.level[row]) and (spte & TYPE_MASK) != TYPE_DISABLED
            if scattered and not start <= np.int64(t.shadowed[row, i] >> GFN_SHIFT) < end:
                continue
            if not wanted:
                continue
            if t.shadow[row]:
                flush = flush or (spte & (mendable | WRITABLE)) == mendable
            if (spte & dirty) == ZERO or (rewrites and t.shadow[row] == 0):
                t.sptes[row, i] = spte | dirty
                written += 1
                flush = flush or t.shadow[row] == 0
    return written, flush
