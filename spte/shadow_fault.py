"""The shadow MMU's slow path for direct roots: shadow pages found by gfn and role, leaves in rmaps, neighbours prefetched."""

from __future__ import annotations

import numpy as np

from spte import context as cx
from spte._jit import helper, kernel
from spte.bits import MMU_PRESENT, PFN_MASK, ROLE_AD_DISABLED, ROLE_GUEST_MODE, SHIFT_PAGE, U64, ZERO
from spte.entries import child_gfn, link, make_leaf
from spte.fault import fault_page, mmio_spte, nx_holds, nx_mark_of
from spte.host import writable_now
from spte.rmap import rmap_add, rmap_remove
from spte.slots import find_slot, mark_dirty, note
from spte.tables import alloc_row, child_of, count_leaf, index_of, is_leaf, is_link

ROLE_LEVEL = 0xF
PREFETCH = 8  # SPTEs of the aligned group that a fault fills


@helper
def _bucket(t, gfn, role):
    return (gfn ^ (gfn >> 9) ^ (role << 3)) & (t.hash.shape[0] - 1)


@kernel
def get_page(t, m, gfn, level, role):
    """Return the shadow page of `gfn` with `role`, a new one if there is none; -1 if the arena is full."""
    at = _bucket(t, gfn, role)
    row = np.int64(t.hash[at]) - 1
    while row >= 0:
        if t.gfn[row] == gfn and np.int64(t.role[row]) == role:
            return row
        row = np.int64(t.hash_next[row]) - 1
    row = alloc_row(t, level, gfn, U64(role), np.int64(-1), m.lay.nonpresent)
    if row >= 0:
        t.shadow[row] = 1
        t.hash_next[row] = t.hash[at]
        t.hash[at] = row + 1
    return row


@helper
def drop_leaf(t, s, m, row, i):
    """Make a present leaf of the shadow MMU non-present and take it from its rmap."""
    level = np.int64(t.level[row])
    gfn = child_gfn(t, row, i)
    t.sptes[row, i] = m.lay.nonpresent
    rmap_remove(s, find_slot(s, gfn), gfn, level, row * 512 + i)
    count_leaf(t, level, -1)
    t.meta[cx.ZAPPED] += 1
    t.meta[cx.SPTES_WRITTEN] += 1


@helper
def _next_page(t, s, m, row, i, nx_mark):
    """Return the page below entry `i` of `row`, found or made and linked; a huge leaf there is dropped with a flush."""
    old = t.sptes[row, i]
    if is_link(old):
        return child_of(old)
    level = np.int64(t.level[row]) - 1
    child = get_page(t, m, child_gfn(t, row, i), level, (np.int64(t.role[row]) & ~ROLE_LEVEL) | level)
    if child < 0:
        return child
    if (old & MMU_PRESENT) != ZERO:
        drop_leaf(t, s, m, row, i)
        t.meta[cx.FLUSHES] += 1
    link(t, m, row, i, child)
    t.meta[cx.SPTES_WRITTEN] += 1
    if nx_mark and t.nx_disallowed[child] == 0:
        t.nx_disallowed[child] = nx_mark
        t.meta[cx.NX_SPLITS] += nx_mark == 2
    return child


@helper
def set_leaf(t, s, v, m, k, row, i, gfn, pfn, host_writable, prefetch):
    """Put the leaf of `gfn` at entry `i` of `row`; returns whether the entry changed."""
    level = np.int64(t.level[row])
    old = t.sptes[row, i]
    flush = False
    mapped = False
    if (old & MMU_PRESENT) != ZERO:
        if level > 1 and is_link(old):  # the page below stays in the hash, with what it maps
            t.parent[child_of(old)] = -1
            t.sptes[row, i] = m.lay.nonpresent
            flush = True
        elif ((old & PFN_MASK) >> SHIFT_PAGE) != pfn:
            drop_leaf(t, s, m, row, i)
            flush = True
        else:
            mapped = True
    old = t.sptes[row, i]
    guest_mode = t.role[row] & ROLE_GUEST_MODE != 0
    new = make_leaf(m, level, pfn, old, prefetch, host_writable, guest_mode, not (m.nx and level > 1))
    if host_writable and s.table[k, cx.FLAGS] & cx.LOG_DIRTY_PAGES:
        mark_dirty(t, s, v, k, gfn)
    if new == old:
        return False
    lost = old & ~new & (m.lay.accessed | m.lay.dirty)
    if mapped and lost != ZERO:
        flush = True
    t.sptes[row, i] = new
    t.meta[cx.SPTES_WRITTEN] += 1
    t.meta[cx.FLUSHES] += flush
    if not mapped:
        rmap_add(s, k, gfn, level, row * 512 + i)
        count_leaf(t, level, 1)
    if v.log.shape[0] > 0:
        note(v, cx.EV_SET, gfn, level, new, 0, 0)
    return True


@helper
def _prefetch_run(t, s, h, v, m, row, first, end):
    """Fill the empty entries ``[first, end)`` of `row` while the host has a writable page at once; False ends all prefetch."""
    gfn = child_gfn(t, row, first)
    k = find_slot(s, gfn)
    if k < 0 or s.table[k, cx.FLAGS] & (cx.LOG_DIRTY_PAGES | cx.READONLY):
        return False
    if gfn + (end - first) > s.table[k, cx.BASE] + s.table[k, cx.NPAGES]:
        return False
    hpage = s.table[k, cx.HPAGE] + gfn - s.table[k, cx.BASE]
    if not writable_now(h, hpage):
        return False
    for i in range(first, end):
        if not writable_now(h, hpage + i - first):
            break
        set_leaf(t, s, v, m, k, row, i, gfn + i - first, U64(hpage + i - first), True, True)
    return True


@helper
def _prefetch_neighbours(t, s, h, v, m, row, at):
    """Map the other pages of the aligned group of 8 before they are asked for; leaves not accessed yet."""
    if np.int64(t.role[row]) & ROLE_AD_DISABLED or t.level[row] > 1:
        return
    base = at & ~(PREFETCH - 1)
    first = np.int64(-1)
    for i in range(base, base + PREFETCH):
        if (t.sptes[row, i] & MMU_PRESENT) != ZERO or i == at:
            if first >= 0 and not _prefetch_run(t, s, h, v, m, row, first, i):
                return
            first = np.int64(-1)
        elif first < 0:
            first = np.int64(i)
    if first >= 0:
        _prefetch_run(t, s, h, v, m, row, first, base + PREFETCH)


@helper
def shadow_map_gfn(t, s, h, v, m, k, gfn, kind, prefetch):
    """Take the shadow MMU's slow path for a direct root. Returns an exit reason, DONE if the leaf is there."""
    reason, pfn, host_writable, fits = fault_page(s, h, m, k, gfn, kind)
    if reason != cx.DONE:
        return reason
    no_huge = m.nx and kind == cx.EXEC
    row = v.reg[cx.ROOT]
    level = np.int64(t.level[row])
    goal = np.int64(1) if no_huge else min(fits, level - 1)  # a PAE root has no leaves
    i = index_of(gfn, level)
    while True:
        if level == goal and nx_holds(t, m, t.sptes[row, i], level):
            goal -= 1
        if level == goal:
            break
        nx_mark = nx_mark_of(m, level, fits) if no_huge else 0
        row = _next_page(t, s, m, row, i, nx_mark)
        if row < 0:
            return cx.EXIT_NOMEM
        level -= 1
        i = index_of(gfn, level)
    if k < 0:
        if is_leaf(t.sptes[row, i], level):
            drop_leaf(t, s, m, row, i)
        t.sptes[row, i] = mmio_spte(m, s, gfn)
        t.meta[cx.SPTES_WRITTEN] += 1
        v.stat[cx.PF_EMULATE] += not prefetch
        v.stat[cx.PF_MMIO_SPTE_CREATED] += 1
        return cx.EXIT_MMIO
    first = U64(pfn) & ~((U64(1) << U64(9 * (level - 1))) - U64(1))
    if not set_leaf(t, s, v, m, k, row, i, gfn, first, host_writable, prefetch):
        v.stat[cx.PF_SPURIOUS] += not prefetch
        return cx.DONE
    v.stat[cx.PF_FIXED] += not prefetch
    _prefetch_neighbours(t, s, h, v, m, row, i)
    return cx.DONE
