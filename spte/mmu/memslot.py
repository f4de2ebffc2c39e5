"""Memslots as kernels see them: lookup, mapping level, marking a gfn dirty in a bitmap or ring."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays import context as cx
from spte.host.pages import HUGE, HUGETLB_1G, HUGETLB_2M, THP, host_level

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
    return kind == THP or kind == HUGETLB_2M or kind == HUGETLB_1G


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
