"""Zap: drop whole roots, or the leaves of a gfn range. The caller flushes, or makes every vCPU load a new root."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.arrays.context import FLUSHES, FREED, ZAPPED
from spte.bits import MMU_PRESENT, ROLE_INVALID, ZERO
from spte.mmu.tdp_mmu import drop_entry, free_table
from spte.mmu.walk import child_of, index_of, is_leaf, is_link, walk


@kernel
def zap_root(t, m, root, invalid):
    """Drop all below `root`, which turns `invalid` if asked to and stays until no vCPU holds it; returns tables freed."""
    if invalid:
        t.role[root] |= np.uint32(ROLE_INVALID)
    dropped, freed = 0, t.meta[FREED]
    for i in range(512):
        spte = t.sptes[root, i]
        if is_link(spte):
            t.sptes[root, i] = m.lay.nonpresent
            dropped += free_table(t, child_of(spte))
    t.meta[ZAPPED] += dropped
    return t.meta[FREED] - freed


@kernel
def zap_range(t, m, roots, start, end):
    """Drop every leaf that maps a page of gfns ``[start, end)``, huge ones whole; tables stay. Returns leaves dropped."""
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
def zap_range_tables(t, m, roots, start, end):
    """As `zap_range`, but tables whose gfns all lie in the range go whole, as up to 5.17, each with a flush; returns entries dropped."""
    dropped = 0
    freed = t.meta[FREED]
    for r in range(roots.shape[0]):
        gfn = start
        while gfn < end:
            row, level = roots[r], np.int64(t.level[roots[r]])
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
        t.meta[FLUSHES] += t.meta[FREED] - freed
    return dropped
