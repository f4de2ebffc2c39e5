"""Guest tables that KVM shadows: no huge leaf maps them, and no write to them goes unseen.

The table of a page above level 1 is write-tracked, so that writes are emulated; that of a level-1 page is write-protected until
the guest writes it and the page turns *unsync*.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.arrays.tables import PATH
from spte.bits import ROLE_IS_DIRECT, WRITABLE, ZERO, child_of, is_leaf, is_link
from spte.mmu.memslot import find_slot
from spte.mmu.rmap import head_of, next_of, ref_of
from spte.mmu.walk import walk


@helper
def bucket_of(t, gfn):
    """Return the hash bucket of the pages of `gfn`."""
    return (gfn ^ (gfn >> 9) ^ (gfn >> 18)) & (t.hash.shape[0] - 1)


@helper
def is_direct(t, row):
    """Tell whether `row` maps gfns one after the other, not what a guest table says."""
    return np.int64(t.pages[row].role) & ROLE_IS_DIRECT != 0


@kernel_noinline
def protect_rmaps(t, s, m, k, gfn, lowest):
    """Take W and MMU_WRITABLE from every leaf of level >= `lowest` that maps `gfn` of slot `k` by rmap; returns SPTEs changed."""
    changed = 0
    both = WRITABLE | m.lay.mmu_writable
    for level in range(lowest, 4):
        head = s.rmaps[head_of(s, k, gfn, np.int64(level))]
        while head != 0:
            ref = ref_of(s, head)
            head = next_of(s, head)
            spte = t.sptes[ref >> 9, ref & 511]
            if (spte & both) != ZERO:
                t.sptes[ref >> 9, ref & 511] = spte & ~both
                changed += 1
    return changed


@kernel_noinline
def protect_gfn(t, s, m, gfn):
    """Take W and MMU_WRITABLE from every leaf of any level that maps `gfn`; returns whether the caller must flush."""
    kvm = t.kvm[0]
    k = find_slot(s, gfn)
    changed = protect_rmaps(t, s, m, k, gfn, 1) if k >= 0 else 0
    both = WRITABLE | m.lay.mmu_writable
    for r in range(kvm.nr_tdp_mmu_roots):
        row, i, level = walk(t, kvm.tdp_mmu_roots[r], gfn)
        spte = t.sptes[row, i]
        if is_leaf(spte, level) and (spte & both) != ZERO:
            t.sptes[row, i] = spte & ~both
            changed += 1
    kvm.sptes_written += changed
    return changed != 0


@helper
def count_shadowed(t, s, gfn, change):
    """Count a page that shadows the table at `gfn` in or out: no huge leaf may map a guest table."""
    t.kvm[0].indirect_shadow_pages += change
    k = find_slot(s, gfn)
    if k >= 0:
        base = s.slots[k].base_gfn
        for level in range(2, 4):
            shift = 9 * (level - 1)
            s.disallow_lpage[s.slots[k].lpage_info[level - 2] + (gfn >> shift) - (base >> shift)] += change


@helper
def is_tracked(t, gfn):
    """Tell whether `gfn` holds a guest table above level 1 that is shadowed: writes to it are emulated."""
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        if t.pages[row].gfn == gfn and t.pages[row].level > 1 and not is_direct(t, row):
            return True
        row = np.int64(t.pages[row].hash_link) - 1
    return False


@helper
def may_write(t, gfn, can_unsync, prefetch):
    """Tell whether a new leaf of `gfn` may be writable; pages that shadow it at level 1 turn unsync, if they may."""
    return t.kvm[0].indirect_shadow_pages == 0 or _may_write(t, gfn, can_unsync, prefetch)


@kernel_noinline
def _may_write(t, gfn, can_unsync, prefetch):
    if is_tracked(t, gfn):
        return False
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        if t.pages[row].gfn == gfn and not is_direct(t, row):
            if not can_unsync:
                return False
            if t.pages[row].unsync == 0:
                if prefetch:
                    return False
                t.pages[row].unsync = 1
                t.kvm[0].mmu_unsync += 1
        row = np.int64(t.pages[row].hash_link) - 1
    return True


@helper
def set_synced(t, row):
    """Take the mark unsync from a page, if it has it."""
    t.kvm[0].mmu_unsync -= np.int64(t.pages[row].unsync)
    t.pages[row].unsync = 0


@kernel_noinline
def unsync_below(t, root, at, room, parents):
    """Put unsync pages below `root`, in address order, into ``t.doomed[at:]``; returns how many.

    At most `room`, in which with `parents` each page on the way to them takes a place too.
    """
    kvm = t.kvm[0]
    found = 0
    taken = 0
    depth = 0
    counted = 0  # pages of the path that have taken their place
    kvm.path[0], kvm.path[PATH] = root, 0
    while depth >= 0:
        row, i = kvm.path[depth], kvm.path[PATH + depth]
        if i == 512:
            depth -= 1
            counted = min(counted, depth)
            continue
        kvm.path[PATH + depth] = i + 1
        if not is_link(t.sptes[row, i]):
            continue
        child = child_of(t.sptes[row, i])
        if t.pages[child].unsync:
            if parents:
                taken += depth - counted
                counted = depth
                if taken >= room:
                    return found
            t.doomed[at + found] = child
            found += 1
            taken += 1
            if taken == room:
                return found
        elif t.pages[child].level > 1:
            depth += 1
            kvm.path[depth], kvm.path[PATH + depth] = child, 0
    return found
