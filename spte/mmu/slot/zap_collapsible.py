"""Zap collapsible: up to 5.18, disabling drops each leaf that a larger one may replace, and the next access makes that."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.arrays.context import BASE, COLLAPSED, FLUSHES, NPAGES, ROWS, SLOT
from spte.bits import ROLE_GUEST_MODE
from spte.mmu.memslot import may_collapse
from spte.mmu.slot.sweep import place
from spte.mmu.tdp_mmu import drop_entry
from spte.mmu.walk import is_leaf


@kernel
def zap_collapsible(t, s, h, m, k, guest_mode):
    """Drop the leaves of slot `k` that larger ones may replace below one root, rows in arena order; returns leaves dropped.

    The root is the one for L2 (`guest_mode` is that bit of a role) or for L1 (0).

    With one flush a leaf they are counted here, else the caller flushes if the result is not 0.
    """
    start = s.table[k, BASE]
    end = start + s.table[k, NPAGES]
    done = 0
    for row in range(t.meta[ROWS]):
        if t.level[row] == 0 or t.shadow[row] or np.int64(t.role[row]) & ROLE_GUEST_MODE != guest_mode:
            continue
        level = np.int64(t.level[row])
        lo, hi = place(t, row, s.table[k, SLOT] >> 16, start, end)
        for i in range(lo, hi):
            gfn = t.gfn[row] + (np.int64(i) << (9 * (level - 1)))
            if is_leaf(t.sptes[row, i], level) and gfn >= start and may_collapse(s, h, m, k, gfn, level, m.collapse_pages):
                drop_entry(t, m, row, i)
                done += 1
    t.meta[COLLAPSED] += done
    if m.flush_each:
        t.meta[FLUSHES] += done
    return done
