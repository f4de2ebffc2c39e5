"""Zap: drop whole roots, or the leaves of a gfn range. The caller flushes, or makes every vCPU load a new root."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.bits import ROLE_INVALID, child_of, is_leaf, is_link
from spte.mmu.tdp_mmu import drop_entry, free_table
from spte.mmu.walk import walk


@kernel
def zap_root(t, mode, root):
    """Mark `root` invalid and drop all below it: KVM's tdp_mmu_zap_root. The row stays until no vCPU holds it. Returns leaves dropped."""
    m = mode[0]
    t.pages[root].role |= np.uint32(ROLE_INVALID)
    dropped = 0
    for i in range(512):
        spte = t.sptes[root, i]
        if is_link(spte):
            t.sptes[root, i] = m.lay.nonpresent
            dropped += free_table(t, child_of(spte))
    t.kvm[0].zapped += dropped
    return dropped


@kernel
def zap_range(t, mode, roots, start, end):
    """Drop every leaf that maps a page of gfns ``[start, end)``: KVM's kvm_tdp_mmu_zap_leafs. Tables stay. Returns leaves dropped."""
    m = mode[0]
    dropped = 0
    for r in range(roots.shape[0]):
        gfn = start
        while gfn < end:
            row, i, level = walk(t, roots[r], gfn)
            if is_leaf(t.sptes[row, i], level):
                dropped += drop_entry(t, m, row, i)
            gfn = (gfn | ((np.int64(1) << (9 * (level - 1))) - 1)) + 1
    return dropped
