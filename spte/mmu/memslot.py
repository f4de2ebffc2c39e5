"""Memslots as kernels see them: lookup, mapping level, marking a gfn dirty in a bitmap or ring."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel, kernel_apart
from spte.arrays import context as cx
from spte.arrays.context import LOG_COLUMNS
from spte.bits import ONE, U64, ZERO
from spte.host.pages import HUGE, HUGETLB_1G, HUGETLB_2M, THP, host_level

U32_MASK = np.int64(0xFFFF_FFFF)
RING_GFN_DIRTY = ONE
SLOT_SHIFT = U64(32)
# What a struct page must be before patch 5: a THP that is mapped huge; that or device memory; any compound page or device memory.
PAGES_THP, PAGES_THP_OR_DEVICE, PAGES_COMPOUND_OR_DEVICE = 0, 1, 2


@kernel
def find_slot(s, gfn):
    """Return the index of the slot that holds `gfn`, -1 if none does."""
    last = s.meta[cx.LAST_HIT]
    n = s.meta[cx.COUNT]
    if last < n:
        base = s.table[last, cx.BASE]
        if base <= gfn < base + s.table[last, cx.NPAGES]:
            return last
    lo, hi = np.int64(0), n
    while lo < hi:
        mid = (lo + hi) >> 1
        if s.table[mid, cx.BASE] <= gfn:
            lo = mid + 1
        else:
            hi = mid
    k = lo - 1
    if k >= 0 and gfn < s.table[k, cx.BASE] + s.table[k, cx.NPAGES]:
        s.meta[cx.LAST_HIT] = k
        return np.int64(k)
    return np.int64(-1)


@helper
def allowed_level(s, k, gfn, max_level):
    """Return the largest level <= `max_level` whose lpage counter of slot `k` at `gfn` is 0."""
    base = s.table[k, cx.BASE]
    if max_level >= 3 and s.disallow[s.table[k, cx.LPAGE3] + (gfn >> 18) - (base >> 18)] == 0:
        return np.int64(3)
    if max_level >= 2 and s.disallow[s.table[k, cx.LPAGE2] + (gfn >> 9) - (base >> 9)] == 0:
        return np.int64(2)
    return np.int64(1)


@kernel
def max_mapping_level(s, h, k, gfn, max_level):
    """Return the largest level at which `gfn`, inside slot `k`, may be mapped."""
    level = allowed_level(s, k, gfn, max_level)
    if level == 1:
        return level
    return min(level, host_level(h, s.table[k, cx.HPAGE] + gfn - s.table[k, cx.BASE]))


@helper
def _page_may_collapse(h, hpage, pages):
    """Decide by the page alone, as before patch 5; `pages` says which count."""
    kind = h.kind[hpage >> 9]
    huge_thp = kind == THP and h.block[hpage >> 9] >= HUGE
    if pages == PAGES_THP:
        return huge_thp
    device = (kind == HUGETLB_2M or kind == HUGETLB_1G) and h.device[hpage >> 9] != 0
    if pages == PAGES_THP_OR_DEVICE:
        return huge_thp or device
    if kind == THP:
        return (h.alone[hpage >> 9, (hpage & 511) >> 6] >> U64(hpage & 63)) & ONE == ZERO
    return kind == HUGETLB_2M or kind == HUGETLB_1G


@helper
def may_collapse(s, h, m, k, gfn, level, pages):
    """Tell whether disabling drops a leaf of `level` at `gfn` of slot `k`; before patch 5 only `pages` and the page matter."""
    hpage = s.table[k, cx.HPAGE] + gfn - s.table[k, cx.BASE]
    if not m.collapse_precise:
        return _page_may_collapse(h, hpage, pages)
    allowed = allowed_level(s, k, gfn, m.max_level)
    if allowed == 1:
        return False
    host = host_level(h, hpage)
    return level < (min(allowed, host) if m.level_clamped else host)


@kernel_apart
def note(v, kind, a, b, c, d, e):
    """Append an event to the vCPU's log, if one is kept."""
    n = v.reg[cx.LOGGED]
    if n < v.log.shape[0]:
        v.log[n, 0] = U64(kind)
        v.log[n, 1] = U64(a)
        v.log[n, 2] = U64(b)
        v.log[n, 3] = U64(c)
        v.log[n, 4] = U64(d)
        v.log[n, LOG_COLUMNS - 1] = U64(e)
        v.reg[cx.LOGGED] = n + 1


@kernel_apart
def ring_push(v, slot, offset):
    """Push an entry on the vCPU's dirty ring; asks for an exit from the soft limit on."""
    dirty = v.reg[cx.RING_DIRTY]
    i = dirty & (v.reg[cx.RING_SIZE] - 1)
    v.ring[i, 1] = U64(offset)
    v.ring[i, 0] = (U64(slot) << SLOT_SHIFT) | RING_GFN_DIRTY
    dirty = (dirty + 1) & U32_MASK
    v.reg[cx.RING_DIRTY] = dirty
    used = (dirty - v.reg[cx.RING_RESET]) & U32_MASK
    if used >= v.reg[cx.RING_SOFT]:
        v.reg[cx.RING_FULL_REQUEST] = 1
    if v.log.shape[0] > 0:
        note(v, cx.EV_PUSH, dirty, v.reg[cx.RING_RESET], slot, offset, used)


@kernel
def mark_dirty(t, s, v, k, gfn):
    """Mark `gfn` of slot `k` dirty in the running vCPU's ring or the slot's bitmap; ignored if the slot does not log."""
    if v.log.shape[0] > 0:
        note(v, cx.EV_MARK, gfn, 0, 0, 0, 0)
    if k < 0 or s.table[k, cx.FLAGS] & cx.LOG_DIRTY_PAGES == 0:
        return
    t.meta[cx.DIRTY_MARKS] += 1
    offset = gfn - s.table[k, cx.BASE]
    if v.reg[cx.RING_SIZE] > 0:
        ring_push(v, s.table[k, cx.SLOT], offset)
    elif s.table[k, cx.BITMAP] >= 0:
        s.words[s.table[k, cx.BITMAP] + (offset >> 6)] |= ONE << U64(offset & 63)
