"""Life of the shadow MMU's pages: found by gfn and role, linked from any number of entries, zapped; guest tables write-protected.

A page that shadows a guest table keeps the gfn and access of each entry. The table may not be written unseen: that of a
page above level 1 is write-tracked, so that writes are emulated; that of a level-1 page is write-protected until the guest
writes it and the page turns *unsync*.
"""

from __future__ import annotations

import numpy as np

from spte import context as cx
from spte._jit import helper, kernel_apart, kernel_called
from spte.bits import (
    MMU_PRESENT,
    ROLE_AD_DISABLED,
    ROLE_GUEST_MODE,
    ROLE_INVALID,
    ROLE_IS_DIRECT,
    SHIFT_PAGE,
    TYPE_DISABLED,
    U64,
    WRITABLE,
    ZERO,
)
from spte.entries import child_gfn, drop_nx_mark
from spte.rmap import chain_add, chain_remove, head_of, next_of, ref_of, rmap_remove
from spte.slots import find_slot
from spte.tables import alloc_row, child_of, count_leaf, free_row, is_leaf, is_link, walk

ACCESS_BITS, ACCESS_MASK = U64(3), U64(7)
PATH = 8  # levels of a walk over pages, two columns each


@helper
def bucket_of(t, gfn):
    """Return the hash bucket of the pages of `gfn`."""
    return (gfn ^ (gfn >> 9) ^ (gfn >> 18)) & (t.hash.shape[0] - 1)


@helper
def is_direct(t, row):
    """Tell whether `row` maps gfns one after the other, not what a guest table says."""
    return np.int64(t.role[row]) & ROLE_IS_DIRECT != 0


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
        return (np.int64(t.role[row]) >> 8) & 7
    return np.int64(t.shadowed[row, i] & ACCESS_MASK)


@helper
def set_shadowed(t, row, i, gfn, access):
    """Note what guest-table entry `i` of `row` says; a direct page says it by itself."""
    if not is_direct(t, row):
        t.shadowed[row, i] = (U64(gfn) << ACCESS_BITS) | U64(access)


@helper
def drop_leaf(t, s, m, row, i):
    """Make a present leaf of the shadow MMU non-present and take it from its rmap."""
    level = np.int64(t.level[row])
    gfn = entry_gfn(t, row, i)
    t.sptes[row, i] = m.lay.nonpresent
    rmap_remove(s, find_slot(s, gfn), gfn, level, row * 512 + i)
    count_leaf(t, level, -1)
    t.meta[cx.ZAPPED] += 1
    t.meta[cx.SPTES_WRITTEN] += 1


@kernel_called
def link_page(t, s, m, row, i, child):
    """Make entry `i` of `row` point to shadow page `child`."""
    link = m.lay.link
    if np.int64(t.role[child]) & ROLE_AD_DISABLED:
        link = (link & ~m.lay.accessed) | TYPE_DISABLED
    t.sptes[row, i] = link | (U64(child) << SHIFT_PAGE)
    chain_add(s, t.parents, child, row * 512 + i)
    t.meta[cx.SPTES_WRITTEN] += 1


@kernel_called
def unlink_page(t, s, m, row, i):
    """Make a link to a shadow page non-present; returns the page, which stays in the hash."""
    child = child_of(t.sptes[row, i])
    t.sptes[row, i] = m.lay.nonpresent
    chain_remove(s, t.parents, child, row * 512 + i)
    t.meta[cx.SPTES_WRITTEN] += 1
    return child


@kernel_apart
def protect_gfn(t, s, m, gfn):
    """Take W and MMU_WRITABLE from every leaf of any level that maps `gfn`; returns whether the caller must flush."""
    k = find_slot(s, gfn)
    changed = 0
    both = WRITABLE | m.lay.mmu_writable
    for level in range(1, 4):
        head = s.rmaps[head_of(s, k, gfn, np.int64(level))]
        while head != 0:
            ref = ref_of(s, head)
            head = next_of(s, head)
            spte = t.sptes[ref >> 9, ref & 511]
            if (spte & both) != ZERO:
                t.sptes[ref >> 9, ref & 511] = spte & ~both
                changed += 1
    for r in range(t.meta[cx.TDP_ROOTS]):
        row, i, level = walk(t, t.roots[r], gfn)
        spte = t.sptes[row, i]
        if is_leaf(spte, level) and (spte & both) != ZERO:
            t.sptes[row, i] = spte & ~both
            changed += 1
    t.meta[cx.SPTES_WRITTEN] += changed
    return changed != 0


@helper
def count_shadowed(t, s, gfn, change):
    """Count a page that shadows the table at `gfn` in or out: no huge leaf may map a guest table."""
    t.meta[cx.INDIRECT] += change
    k = find_slot(s, gfn)
    if k >= 0:
        base = s.table[k, cx.BASE]
        for column in (cx.LPAGE2, cx.LPAGE3):
            shift = 9 * (column - cx.LPAGE2 + 1)
            s.disallow[s.table[k, column] + (gfn >> shift) - (base >> shift)] += change


@kernel_apart
def new_page(t, s, m, gfn, level, role):
    """Make a shadow page and write-protect the table that it shadows, with a flush if that changed; -1 if the arena is full."""
    row = alloc_row(t, level, gfn, U64(role), np.int64(-1), m.lay.nonpresent)
    if row >= 0:
        at = bucket_of(t, gfn)
        t.shadow[row] = 1
        t.unsync[row] = 0
        t.flood[row] = 0
        t.parents[row] = 0
        t.hash_next[row] = t.hash[at]
        t.hash[at] = row + 1
        if not is_direct(t, row):
            count_shadowed(t, s, gfn, 1)
            if protect_gfn(t, s, m, gfn):
                t.meta[cx.FLUSHES] += 1
    return row


@helper
def is_tracked(t, gfn):
    """Tell whether `gfn` holds a guest table above level 1 that is shadowed: writes to it are emulated."""
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        if t.gfn[row] == gfn and t.level[row] > 1 and not is_direct(t, row):
            return True
        row = np.int64(t.hash_next[row]) - 1
    return False


@helper
def may_write(t, gfn, can_unsync, prefetch):
    """Tell whether a new leaf of `gfn` may be writable; pages that shadow it at level 1 turn unsync, if they may."""
    return t.meta[cx.INDIRECT] == 0 or _may_write(t, gfn, can_unsync, prefetch)


@kernel_apart
def _may_write(t, gfn, can_unsync, prefetch):
    if is_tracked(t, gfn):
        return False
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        if t.gfn[row] == gfn and not is_direct(t, row):
            if not can_unsync:
                return False
            if t.unsync[row] == 0:
                if prefetch:
                    return False
                t.unsync[row] = 1
                t.meta[cx.UNSYNC] += 1
        row = np.int64(t.hash_next[row]) - 1
    return True


@helper
def set_synced(t, row):
    """Take the mark unsync from a page, if it has it."""
    t.meta[cx.UNSYNC] -= np.int64(t.unsync[row])
    t.unsync[row] = 0


@kernel_apart
def unsync_below(t, root, at, most):
    """Put at most `most` unsync pages below `root`, in address order, into ``t.doomed[at:]``; returns how many."""
    found = 0
    depth = 0
    t.path[0], t.path[PATH] = root, 0
    while depth >= 0:
        row, i = t.path[depth], t.path[PATH + depth]
        if i == 512:
            depth -= 1
            continue
        t.path[PATH + depth] = i + 1
        if not is_link(t.sptes[row, i]):
            continue
        child = child_of(t.sptes[row, i])
        if t.unsync[child]:
            t.doomed[at + found] = child
            found += 1
            if found == most:
                return found
        elif t.level[child] > 1:
            depth += 1
            t.path[depth], t.path[PATH + depth] = child, 0
    return found


@helper
def _leave_hash(t, row):
    at = bucket_of(t, t.gfn[row])
    here = np.int64(t.hash[at]) - 1
    if here == row:
        t.hash[at] = t.hash_next[row]
        return
    while np.int64(t.hash_next[here]) - 1 != row:
        here = np.int64(t.hash_next[here]) - 1
    t.hash_next[here] = t.hash_next[row]


@helper
def drop_entry_of(t, s, m, row, i):
    """Empty entry `i` of a shadow page; returns a page below that nobody links to any more and that only L2 used, else -1."""
    spte = t.sptes[row, i]
    if (spte & MMU_PRESENT) == ZERO:
        t.sptes[row, i] = m.lay.nonpresent
        return np.int64(-1)
    if not is_link(spte) or t.level[row] == 1:
        drop_leaf(t, s, m, row, i)
        return np.int64(-1)
    child = unlink_page(t, s, m, row, i)
    if m.tdp and np.int64(t.role[child]) & ROLE_GUEST_MODE and t.parents[child] == 0:
        return child
    return np.int64(-1)


@kernel_apart
def zap_page(t, s, m, row):
    """Zap a shadow page: what it maps, the links to it, unsync pages below; the caller flushes.

    A page that a vCPU holds as root turns invalid and empty; the vCPU lets go of it at its next entry.
    """
    count = 1
    t.doomed[0] = row
    while count > 0:
        row = np.int64(t.doomed[count - 1])
        if t.level[row] == 0:  # came up twice
            count -= 1
            continue
        if t.level[row] > 1 and t.meta[cx.UNSYNC] > 0 and unsync_below(t, row, count, 1):
            count += 1
            continue
        count -= 1
        for i in range(512):
            child = drop_entry_of(t, s, m, row, np.int64(i))
            if child >= 0:
                t.doomed[count] = child
                count += 1
        while t.parents[row] != 0:
            ref = ref_of(s, t.parents[row])
            unlink_page(t, s, m, ref >> 9, ref & 511)
        if not is_direct(t, row):
            count_shadowed(t, s, t.gfn[row], -1)
            set_synced(t, row)
        drop_nx_mark(t, row)
        _leave_hash(t, row)
        if t.held[row]:
            t.role[row] |= np.uint32(ROLE_INVALID)
        else:
            free_row(t, row)


@kernel_apart
def find_page(t, s, m, gfn, level, role):
    """Return the shadow page of `gfn` with `role`, -1 if there is none. Above level 1 an unsync page of that table is zapped."""
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        following = np.int64(t.hash_next[row]) - 1
        if t.gfn[row] == gfn:
            if np.int64(t.role[row]) == role:
                return row
            if level > 1 and t.unsync[row]:
                zap_page(t, s, m, row)
        row = following
    return np.int64(-1)
