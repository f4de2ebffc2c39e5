"""Memslots as kernels see them: lookup, mapping level, marking a gfn dirty in a bitmap or ring."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel, kernel_noinline
from spte.bits import ONE, U64, ZERO
from spte.host.pages import HUGE, HUGETLB_1G, HUGETLB_2M, THP, host_level

# What a struct page must be before patch 5: a THP that is mapped huge; that or device memory; any compound page or device memory.
PAGES_THP, PAGES_THP_OR_DEVICE, PAGES_COMPOUND_OR_DEVICE = 0, 1, 2


@kernel_noinline
def _search_slot(s, gfn):
    lo, hi = np.int64(0), s.memslots[0].used_slots
    while lo < hi:
        mid = (lo + hi) >> 1
        if s.slots[mid].base_gfn <= gfn:
            lo = mid + 1
        else:
            hi = mid
    k = lo - 1
    if k >= 0 and gfn < s.slots[k].base_gfn + s.slots[k].npages:
        s.memslots[0].last_used_slot = k
        return np.int64(k)
    return np.int64(-1)


@kernel
def find_slot(s, gfn):
    """Return the index of the slot that holds `gfn`, -1 if none does: KVM's gfn_to_memslot."""
    k = s.memslots[0].last_used_slot
    if k < s.memslots[0].used_slots:
        base = s.slots[k].base_gfn
        if base <= gfn < base + s.slots[k].npages:
            return k
    return _search_slot(s, gfn)


@helper
def allowed_level(s, k, gfn, max_level):
    """Return the largest level <= `max_level` whose lpage counter of slot `k` at `gfn` is 0."""
    base = s.slots[k].base_gfn
    if max_level >= 3 and s.disallow_lpage[s.slots[k].lpage_info[1] + (gfn >> 18) - (base >> 18)] == 0:
        return np.int64(3)
    if max_level >= 2 and s.disallow_lpage[s.slots[k].lpage_info[0] + (gfn >> 9) - (base >> 9)] == 0:
        return np.int64(2)
    return np.int64(1)


@kernel
def max_mapping_level(s, h, k, gfn, max_level):
    """Return the largest level at which `gfn`, inside slot `k`, may be mapped."""
    level = allowed_level(s, k, gfn, max_level)
    if level == 1:
        return level
    return min(level, host_level(h, s.slots[k].hpage + gfn - s.slots[k].base_gfn))


@helper
def _page_may_collapse(h, hpage, pages):
    """Decide by the page alone, as before patch 5; `pages` says which count."""
    kind = h.kinds[hpage >> 9]
    huge_thp = kind == THP and h.blocks[hpage >> 9].state >= HUGE
    if pages == PAGES_THP:
        return huge_thp
    device = (kind == HUGETLB_2M or kind == HUGETLB_1G) and h.blocks[hpage >> 9].device != 0
    if pages == PAGES_THP_OR_DEVICE:
        return huge_thp or device
    if kind == THP:
        return (h.alone[hpage >> 9, (hpage & 511) >> 6] >> U64(hpage & 63)) & ONE == ZERO
    return kind == HUGETLB_2M or kind == HUGETLB_1G


@helper
def may_collapse(s, h, m, k, gfn, level, pages):
    """Tell whether disabling drops a leaf of `level` at `gfn` of slot `k`; before patch 5 only `pages` and the page matter."""
    hpage = s.slots[k].hpage + gfn - s.slots[k].base_gfn
    if not m.collapse_precise:
        return _page_may_collapse(h, hpage, pages)
    allowed = allowed_level(s, k, gfn, m.max_level)
    if allowed == 1:
        return False
    host = host_level(h, hpage)
    return level < (min(allowed, host) if m.level_clamped else host)
