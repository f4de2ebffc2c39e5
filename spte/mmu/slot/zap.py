"""Zap: drop whole roots, or the leaves of a gfn range. The caller flushes, or makes every vCPU load a new root."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.bits import MMU_PRESENT, ROLE_INVALID, ZERO, child_of, is_leaf, is_link
from spte.mmu.tdp_mmu import drop_entry, free_table
from spte.mmu.walk import index_of, walk


@kernel
def zap_root(t, mode, root, invalid):
    """Drop all below `root`, which turns `invalid` if asked to and stays until no vCPU holds it: KVM's tdp_mmu_zap_root.

    Returns tables freed.
    """
    m = mode[0]
    kvm = t.kvm[0]
    if invalid:
        t.pages[root].role |= np.uint32(ROLE_INVALID)
    dropped, freed = 0, kvm.freed
    for i in range(512):
        spte = t.sptes[root, i]
        if is_link(spte):
            t.sptes[root, i] = m.lay.nonpresent
            dropped += free_table(t, child_of(spte))
    kvm.zapped += dropped
    return kvm.freed - freed


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


@kernel
def zap_range_tables(t, mode, roots, start, end):
    """As `zap_range`, but tables whose gfns all lie in the range go whole, as up to 5.17, each with a flush; returns entries dropped."""
    m = mode[0]
    kvm = t.kvm[0]
    dropped = 0
    freed = kvm.freed
    for r in range(roots.shape[0]):
        gfn = start
        while gfn < end:
            row, level = roots[r], np.int64(t.pages[roots[r]].level)
            while True:
                i = index_of(gfn, level)
                span = np.int64(1) << (9 * (level - 1))
                spte = t.sptes[row, i]
                covered = gfn & (span - 1) == 0 and gfn + span <= end
                if covered or not is_link(spte) or level == 1:
                    break
                row = child_of(spte)
                level -= 1
            if (spte & MMU_PRESENT) != ZERO:
                drop_entry(t, m, row, i)
                dropped += 1
            gfn = (gfn | (span - 1)) + 1
    if m.freed_table_flush:
        kvm.remote_tlb_flush_requests += kvm.freed - freed
    return dropped
