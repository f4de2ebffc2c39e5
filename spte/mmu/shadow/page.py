"""Life of the shadow MMU's pages: found by gfn and role, linked from any number of entries, zapped.

A page that shadows a guest table keeps the gfn and access of each entry.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.bits import (
    MMU_PRESENT,
    ROLE_AD_DISABLED,
    ROLE_GUEST_MODE,
    ROLE_INVALID,
    ROLE_SMM_SHIFT,
    SHIFT_PAGE,
    TYPE_DISABLED,
    U64,
    ZERO,
    child_of,
    is_link,
)
from spte.mmu.arena import alloc_row, count_leaf, free_row
from spte.mmu.memslot import find_slot
from spte.mmu.page_track import bucket_of, count_shadowed, is_direct, protect_gfn, set_synced, unsync_below
from spte.mmu.rmap import pte_list_add, pte_list_remove, ref_of, rmap_remove
from spte.mmu.tdp_mmu import child_gfn, drop_nx_mark

ACCESS_BITS, ACCESS_MASK = U64(3), U64(7)


@helper
def entry_gfn(t, row, i):
    """Return the gfn that entry `i` of a shadow page maps first."""
    if is_direct(t, row):
        return child_gfn(t, row, i)
    return np.int64(t.shadowed[row, i] >> ACCESS_BITS)


@helper
def entry_access(t, row, i):
    """Return what entry `i` of a shadow page may allow."""
    if is_direct(t, row):
        return (np.int64(t.pages[row].role) >> 8) & 7
    return np.int64(t.shadowed[row, i] & ACCESS_MASK)


@helper
def set_shadowed(t, row, i, gfn, access):
    """Note what guest-table entry `i` of `row` says; a direct page says it by itself."""
    if not is_direct(t, row):
        t.shadowed[row, i] = (U64(gfn) << ACCESS_BITS) | U64(access)


@helper
def drop_rmap_leaf(t, s, m, k, row, i):
    """As `drop_leaf` where slot `k` of the leaf is known, for loops over rmaps."""
    kvm = t.kvm[0]
    level = np.int64(t.pages[row].level)
    gfn = entry_gfn(t, row, i)
    t.sptes[row, i] = m.lay.nonpresent
    rmap_remove(s, k, gfn, level, row * 512 + i)
    count_leaf(t, level, -1)
    kvm.zapped += 1
    kvm.sptes_written += 1


@kernel_noinline
def drop_leaf(t, s, m, row, i):
    """Make a present leaf of the shadow MMU non-present and take it from its rmap: KVM's drop_spte."""
    drop_rmap_leaf(t, s, m, find_slot(s, entry_gfn(t, row, i)), row, i)


@kernel_noinline
def link_page(t, s, m, row, i, child):
    """Make entry `i` of `row` point to shadow page `child`."""
    link = m.lay.link
    if np.int64(t.pages[child].role) & ROLE_AD_DISABLED:
        link = (link & ~m.lay.accessed) | TYPE_DISABLED
    t.sptes[row, i] = link | (U64(child) << SHIFT_PAGE)
    t.pages[child].parent_ptes = pte_list_add(s, t.pages[child].parent_ptes, row * 512 + i)
    t.kvm[0].sptes_written += 1


@kernel_noinline
def unlink_page(t, s, m, row, i):
    """Make a link to a shadow page non-present; returns the page, which stays in the hash."""
    child = child_of(t.sptes[row, i])
    t.sptes[row, i] = m.lay.nonpresent
    t.pages[child].parent_ptes = pte_list_remove(s, t.pages[child].parent_ptes, row * 512 + i)
    t.kvm[0].sptes_written += 1
    return child


@kernel_noinline
def new_page(t, s, m, gfn, level, role):
    """Make a shadow page and write-protect the table that it shadows, with a flush if that changed; -1 if the arena is full."""
    row = alloc_row(t, level, gfn, U64(role), m.lay.nonpresent)
    if row >= 0:
        at = bucket_of(t, gfn)
        t.pages[row].shadow = 1
        t.pages[row].unsync = 0
        t.pages[row].write_flooding_count = 0
        t.pages[row].parent_ptes = 0
        t.pages[row].hash_link = t.hash[at]
        t.hash[at] = row + 1
        if not is_direct(t, row):
            count_shadowed(t, s, gfn, 1)
            if protect_gfn(t, s, m, gfn):
                t.kvm[0].remote_tlb_flush_requests += 1
    return row


@helper
def _leave_hash(t, row):
    at = bucket_of(t, t.pages[row].gfn)
    here = np.int64(t.hash[at]) - 1
    if here == row:
        t.hash[at] = t.pages[row].hash_link
        return
    while np.int64(t.pages[here].hash_link) - 1 != row:
        here = np.int64(t.pages[here].hash_link) - 1
    t.pages[here].hash_link = t.pages[row].hash_link


@helper
def drop_entry_of(t, s, m, row, i):
    """Empty entry `i` of a shadow page; returns a page below that nobody links to any more and that only L2 used, else -1."""
    spte = t.sptes[row, i]
    if (spte & MMU_PRESENT) == ZERO:
        t.sptes[row, i] = m.lay.nonpresent
        return np.int64(-1)
    if not is_link(spte) or t.pages[row].level == 1:
        drop_leaf(t, s, m, row, i)
        return np.int64(-1)
    child = unlink_page(t, s, m, row, i)
    if m.tdp and np.int64(t.pages[child].role) & ROLE_GUEST_MODE and t.pages[child].parent_ptes == 0:
        return child
    return np.int64(-1)


@kernel_noinline
def zap_page(t, s, m, row):
    """Zap a shadow page: what it maps, the links to it, unsync pages below; the caller flushes.

    A page that a vCPU holds as root turns invalid and empty; the vCPU lets go of it at its next entry.
    """
    count = 1
    t.doomed[0] = row
    while count > 0:
        row = np.int64(t.doomed[count - 1])
        if t.pages[row].level == 0:  # came up twice
            count -= 1
            continue
        if t.pages[row].level > 1 and t.kvm[0].mmu_unsync > 0 and unsync_below(t, row, count, 1, False):
            count += 1
            continue
        count -= 1
        for i in range(512):
            child = drop_entry_of(t, s, m, row, np.int64(i))
            if child >= 0:
                t.doomed[count] = child
                count += 1
        while t.pages[row].parent_ptes != 0:
            ref = ref_of(s, t.pages[row].parent_ptes)
            unlink_page(t, s, m, ref >> 9, ref & 511)
        if not is_direct(t, row):
            count_shadowed(t, s, t.pages[row].gfn, -1)
            set_synced(t, row)
        drop_nx_mark(t, row)
        _leave_hash(t, row)
        if t.pages[row].root_count:
            t.pages[row].role |= np.uint32(ROLE_INVALID)
        else:
            free_row(t, row)


@kernel_noinline
def find_page(t, s, m, gfn, level, role):
    """Return the shadow page of `gfn` with `role`, -1 if there is none. Above level 1 an unsync page of that table is zapped."""
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        following = np.int64(t.pages[row].hash_link) - 1
        if t.pages[row].gfn == gfn:
            if np.int64(t.pages[row].role) == role:
                return row
            # A page of the other address space may have that gfn by chance: its rmaps hang on other slots than `s` has.
            if level > 1 and t.pages[row].unsync and np.int64(t.pages[row].role) >> ROLE_SMM_SHIFT == role >> ROLE_SMM_SHIFT:
                zap_page(t, s, m, row)
        row = following
    return np.int64(-1)
