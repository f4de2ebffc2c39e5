"""Re-arm 64 gfns: what GET, CLEAR and the reset of dirty rings share, KVM's kvm_arch_mmu_enable_log_dirty_pt_masked.

No flush in here: that is the caller's.
"""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import is_shared
from spte._numba.jit import ctz, helper, kernel_noinline
from spte.bits import ONE, U64, WRITABLE, ZERO, is_leaf
from spte.kernels._entries import clear_entry
from spte.kernels._harvest import rearm_window
from spte.mmu.page_track import protect_rmaps
from spte.mmu.rmap import head_of, next_of, ref_of
from spte.mmu.shadow.split import split_rmaps
from spte.mmu.tdp_mmu import log_shift, split_below
from spte.mmu.walk import leaf_table, walk


@helper
def rearm_in_table(t, m, row, first, mask):
    """Re-arm entries ``first + b`` of level-1 `row` for each bit b of `mask`: KVM's clear_dirty_pt_masked. Returns SPTEs changed."""
    shift = log_shift(t, m, row)
    return rearm_window(t.flat, row * 512 + first, mask, shift, shift, is_shared(t))


@kernel_noinline
def write_protect_huge(t, m, root, gfn):
    """Take W and MMU_WRITABLE from a huge leaf that covers `gfn`: KVM's kvm_tdp_mmu_write_protect_gfn. Returns SPTEs changed (0 or 1)."""
    row, i, level = walk(t, root, gfn)
    spte = t.sptes[row, i]
    if level == 1 or not is_leaf(spte, level) or (spte & (WRITABLE | m.lay.mmu_writable)) == ZERO:
        return 0
    t.sptes[row, i] = spte & ~(WRITABLE | m.lay.mmu_writable)
    return 1


@helper
def split_range(t, m, root, start, end):
    """Split the huge leaves that meet gfns ``[start, end)`` to 4 KiB: KVM's kvm_tdp_mmu_try_split_huge_pages.

    Best effort. Returns leaves split; no flush is needed.
    """
    done = 0
    gfn = start
    while gfn < end:
        row, i, level = walk(t, root, gfn)
        if level > 1 and is_leaf(t.sptes[row, i], level):
            done += split_below(t, m, row, i, start, end)
        gfn = (gfn | ((np.int64(1) << (9 * max(level - 1, 1))) - 1)) + 1
    return done


@helper
def _ends(gfn, mask):
    """Return the first and the last gfn of `mask`."""
    end = gfn + 63
    while (mask >> U64(end - gfn)) == ZERO:
        end -= 1
    return gfn + ctz(mask), end


@kernel_noinline
def _rearm_huge(t, m, root, gfn, mask):
    """With initially-set, huge leaves may be writable still: split them, or write-protect those of the mask's ends."""
    start, end = _ends(gfn, mask)
    if m.eager:
        split_range(t, m, root, start, end + 1)
    changed = write_protect_huge(t, m, root, start)
    if start >> 9 != end >> 9:
        changed += write_protect_huge(t, m, root, end)
    return changed


@helper
def rearm_mask(t, m, root, gfn, mask, row):
    """Make the next write to each ``gfn + b``, b a bit of `mask`, visible again under `root`: KVM's kvm_tdp_mmu_clear_dirty_pt_masked.

    `mask` is not 0. `row` is a level-1 table to look in first, -1 for none. Returns ``(SPTEs changed, the table to look in next)``.
    Huge leaves are passed over: a logging slot has none that is writable.
    """
    changed = 0
    if m.clear_arms_huge:
        changed += _rearm_huge(t, m, root, gfn, mask)
    first = gfn & 511
    here = min(np.int64(64), 512 - first)  # the window may begin in one table and end in the next
    part = mask if here == 64 else mask & ((ONE << U64(here)) - ONE)
    if part != ZERO:
        if row < 0 or t.pages[row].level != 1 or t.pages[row].gfn != gfn - first:
            row = leaf_table(t, root, gfn)
        if row >= 0:
            changed += rearm_in_table(t, m, row, first, part)
    part = ZERO if here == 64 else mask >> U64(here)
    if part != ZERO:
        row = leaf_table(t, root, gfn + here)
        if row >= 0:
            changed += rearm_in_table(t, m, row, np.int64(0), part)
    return changed, row


@kernel_noinline
def rearm_rmaps(t, s, m, k, gfn, mask):
    """Make the next write to each ``gfn + b`` visible again in every SPTE of the shadow MMU that maps it.

    KVM's kvm_mmu_clear_dirty_pt_masked, or kvm_mmu_write_protect_pt_masked without PML. Returns SPTEs changed.
    """
    changed = np.int64(0)
    if m.clear_arms_huge:
        start, end = _ends(gfn, mask)
        if m.eager:
            split_rmaps(t, s, m, k, start, end + 1)
        changed += protect_rmaps(t, s, m, k, start, 2)
        if start >> 9 != end >> 9:
            changed += protect_rmaps(t, s, m, k, end, 2)
    part = mask
    while part != ZERO:
        at = gfn + ctz(part)
        part &= part - ONE
        head = s.rmaps[head_of(s, k, at, 1)]
        while head != 0:
            ref = ref_of(s, head)
            head = next_of(s, head)
            shift = log_shift(t, m, ref >> 9)
            changed += np.int64(clear_entry(t.flat, U64(ref), shift, shift, ONE, False))
    return changed


@helper
def rearm(t, s, m, roots, k, gfn, mask, row):
    """Re-arm the 64 gfns from `gfn` of slot `k` under every root, then in every rmap; returns as `rearm_mask`."""
    changed = 0
    one = roots.shape[0] == 1
    for r in range(roots.shape[0]):
        got, row = rearm_mask(t, m, roots[r], gfn, mask, row if one else np.int64(-1))
        changed += got
    if s.slots[k].rmap[0] >= 0:
        changed += rearm_rmaps(t, s, m, k, gfn, mask)
    return changed, row
