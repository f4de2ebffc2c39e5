"""Aging: tell which leaves were used, and make their next use visible. W and D of entries with A/D bits stay as they are."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.bits import is_leaf
from spte.mmu.make_spte import is_accessed, make_old
from spte.mmu.walk import walk


@kernel
def age_range(t, mode, roots, start, end, clear):
    """Count the accessed leaves of gfns ``[start, end)``: KVM's kvm_tdp_mmu_age_gfn_range. `clear`: take A, or park R and X without A."""
    m = mode[0]
    young = 0
    for r in range(roots.shape[0]):
        gfn = start
        while gfn < end:
            row, i, level = walk(t, roots[r], gfn)
            spte = t.sptes[row, i]
            if is_leaf(spte, level) and is_accessed(m, spte):
                young += 1
                if clear:
                    t.sptes[row, i] = make_old(m, spte)
                    t.kvm[0].sptes_written += 1
            gfn = (gfn | ((np.int64(1) << (9 * (level - 1))) - 1)) + 1
    return young
