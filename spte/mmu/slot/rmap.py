"""Slot-wide work on the shadow MMU's leaves by rmap: zap a range, zap what may be larger, age, zap everything.

The caller flushes if the result is not 0.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel, kernel_noinline
from spte.bits import MMU_PRESENT, ROLE_INVALID, U64, ZERO, is_leaf
from spte.mmu.arena import count_leaf, free_row
from spte.mmu.make_spte import is_accessed, make_old
from spte.mmu.memslot import PAGES_COMPOUND_OR_DEVICE, may_collapse
from spte.mmu.page_track import count_shadowed, is_direct, set_synced
from spte.mmu.rmap import head_of, next_of, ref_of
from spte.mmu.shadow.page import drop_leaf, drop_rmap_leaf
from spte.mmu.shadow.split import split_rmaps
from spte.mmu.slot.sweep import place


@kernel
def zap_rmaps(t, s, mode, k, start, end):
    """Drop every SPTE that maps a page of gfns ``[start, end)`` of slot `k`: KVM's kvm_zap_rmap. Returns SPTEs dropped."""
    m = mode[0]
    dropped = 0
    for level in range(1, 4):
        span = np.int64(1) << (9 * (level - 1))
        gfn = start & -span
        while gfn < end:
            at = head_of(s, k, max(gfn, start), level)
            while s.rmaps[at] != 0:
                ref = ref_of(s, s.rmaps[at])
                drop_rmap_leaf(t, s, m, k, ref >> 9, ref & 511)
                dropped += 1
            gfn += span
    return dropped


@kernel_noinline
def _map_exclusively(sptes, row, lo, hi, heads, first):
    """Tell whether entries ``[lo, hi)`` of level-1 `row` are all leaves, each the only one of its gfn; their rmaps begin at `first`."""
    present, other = MMU_PRESENT, np.int64(0)
    ref = np.int64(row * 512 + lo + 1)
    for i in range(U64(hi - lo)):
        present &= sptes[U64(row), U64(lo) + i]
        other |= heads[U64(first) + i] ^ (ref + np.int64(i))
    return present != ZERO and other == 0


@helper
def _drop_leaves(t, s, m, k, row, lo, hi):
    """Drop the leaves ``[lo, hi)`` of level-1 page `row`, all of slot `k`; where all are there and exclusive, two fills do it."""
    kvm = t.kvm[0]
    first = head_of(s, k, t.pages[row].gfn + lo, 1)
    dropped = np.int64(0)
    if _map_exclusively(t.sptes, row, lo, hi, s.rmaps, first):
        for i in range(U64(hi - lo)):
            s.rmaps[U64(first) + i] = 0
            t.sptes[U64(row), U64(lo) + i] = m.lay.nonpresent
        dropped = hi - lo
        count_leaf(t, np.int64(1), -dropped)
        kvm.zapped += dropped
        kvm.sptes_written += dropped
        return dropped
    for i in range(lo, hi):
        if is_leaf(t.sptes[row, i], 1):
            drop_leaf(t, s, m, row, i)
            dropped += 1
    return dropped


@kernel
def zap_collapsible_rmaps(t, s, h, mode, k, max_row_level):
    """Drop the leaves of direct pages of slot `k` whose gfns one larger leaf may map: KVM's kvm_rmap_zap_collapsible_sptes.

    The pages stay; those above `max_row_level` are passed over. Since patch 5 the first gfn of a page decides for all its leaves.
    Returns leaves dropped.
    """
    m = mode[0]
    kvm = t.kvm[0]
    start = s.slots[k].base_gfn
    end = start + s.slots[k].npages
    done = 0
    for row in range(kvm.rows):
        level = np.int64(t.pages[row].level)
        if t.pages[row].shadow != 1 or level == 0 or level > max_row_level or not is_direct(t, row):
            continue
        first = t.pages[row].gfn
        all_or_none = m.collapse_precise != 0
        if all_or_none and not (start <= first < end and may_collapse(s, h, m, k, first, level, PAGES_COMPOUND_OR_DEVICE)):
            continue
        lo, hi = place(t, row, s.slots[k].id >> 16, start, end)
        if all_or_none and level == 1:
            done += _drop_leaves(t, s, m, k, row, lo, hi)
            continue
        for i in range(lo, hi):
            gfn = first + (np.int64(i) << (9 * (level - 1)))
            if is_leaf(t.sptes[row, i], level) and (all_or_none or may_collapse(s, h, m, k, gfn, level, PAGES_COMPOUND_OR_DEVICE)):
                drop_leaf(t, s, m, row, i)
                done += 1
    kvm.collapsed += done
    return done


@kernel
def age_rmaps(t, s, mode, k, start, end, clear):
    """Count the accessed leaves that map gfns ``[start, end)`` of slot `k`: KVM's kvm_age_rmap. `clear`: take their A."""
    m = mode[0]
    young = 0
    for level in range(1, 4):
        span = np.int64(1) << (9 * (level - 1))
        gfn = start & -span
        while gfn < end:
            head = s.rmaps[head_of(s, k, max(gfn, start), level)]
            while head != 0:
                ref = ref_of(s, head)
                head = next_of(s, head)
                spte = t.sptes[ref >> 9, ref & 511]
                if is_accessed(m, spte):
                    young += 1
                    if clear:
                        t.sptes[ref >> 9, ref & 511] = make_old(m, spte)
                        t.kvm[0].sptes_written += 1
            gfn += span
    return young


@kernel
def split_slot_rmaps(t, s, mode, k):
    """Split the huge leaves of the shadow MMU that map slot `k`: KVM's kvm_shadow_mmu_try_split_huge_pages. Returns leaves split."""
    m = mode[0]
    return split_rmaps(t, s, m, k, s.slots[k].base_gfn, s.slots[k].base_gfn + s.slots[k].npages)


@kernel
def zap_all_shadow(t, s, mode):
    """Free every shadow page but those that vCPUs hold as roots, which turn invalid and empty: KVM's kvm_mmu_zap_all_fast.

    Returns the pages that were valid. Rmaps are the caller's to clear.
    """
    m = mode[0]
    kvm = t.kvm[0]
    valid = 0
    for row in range(kvm.rows):
        if t.pages[row].shadow != 1 or t.pages[row].level == 0:
            continue
        level = np.int64(t.pages[row].level)
        leaves = 0
        for i in range(512):
            leaves += is_leaf(t.sptes[row, i], level)
        if level <= 3:
            kvm.pages[level - 1] -= leaves
        kvm.zapped += leaves
        if (np.int64(t.pages[row].role) & ROLE_INVALID) == 0:
            valid += 1
            if not is_direct(t, row):
                count_shadowed(t, s, t.pages[row].gfn, -1)
                set_synced(t, row)
        kvm.nx_lpage_splits -= t.pages[row].nx_huge_page_disallowed == 2
        t.pages[row].nx_huge_page_disallowed = 0
        t.pages[row].parent_ptes = 0
        if t.pages[row].root_count:
            t.pages[row].role |= np.uint32(ROLE_INVALID)
            for i in range(512):
                t.sptes[row, i] = m.lay.nonpresent
        else:
            free_row(t, row)
    t.hash[:] = 0
    return valid
