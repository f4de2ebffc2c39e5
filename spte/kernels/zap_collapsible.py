"""Zap collapsible: up to 5.18, disabling drops each leaf that a larger one may replace, and the next access makes that."""

from __future__ import annotations

import numpy as np

from spte._jit import kernel
from spte.context import BASE, COLLAPSED, FLUSHES, HPAGE, NPAGES, ROWS, SLOT
from spte.entries import drop_entry
from spte.host import HUGE, HUGETLB_1G, HUGETLB_2M, THP, host_level
from spte.slots import allowed_level
from spte.sweep import place
from spte.tables import is_leaf

# What a struct page must be before patch 5: a THP that is mapped huge; that or device memory; any compound page or device memory.
PAGES_THP, PAGES_THP_OR_DEVICE, PAGES_COMPOUND_OR_DEVICE = 0, 1, 2


@kernel
def _page_may_collapse(m, h, hpage):
    """Decide by the page alone, as before patch 5."""
    kind = h.kind[hpage >> 9]
    huge_thp = kind == THP and h.block[hpage >> 9] == HUGE
    if m.collapse_pages == PAGES_THP:
        return huge_thp
    device = (kind == HUGETLB_2M or kind == HUGETLB_1G) and h.device[hpage >> 9] != 0
    if m.collapse_pages == PAGES_THP_OR_DEVICE:
        return huge_thp or device
    return kind == THP or kind == HUGETLB_2M or kind == HUGETLB_1G


@kernel
def _may_collapse(s, h, m, k, gfn, level):
    """Tell whether the leaf of `gfn` is to be dropped."""
    hpage = s.table[k, HPAGE] + gfn - s.table[k, BASE]
    if not m.collapse_precise:
        return _page_may_collapse(m, h, hpage)
    allowed = allowed_level(s, k, gfn, m.max_level)
    if allowed == 1:
        return False
    host = host_level(h, hpage)
    return level < (min(allowed, host) if m.level_clamped else host)


@kernel
def zap_collapsible(t, s, h, m, k):
    """Drop the leaves of slot `k` that larger ones may replace, rows in arena order; returns leaves dropped.

    With one flush a leaf they are counted here, else the caller flushes if the result is not 0.
    """
    start = s.table[k, BASE]
    end = start + s.table[k, NPAGES]
    done = 0
    for row in range(t.meta[ROWS]):
        if t.level[row] == 0:
            continue
        level = np.int64(t.level[row])
        lo, hi = place(t, row, s.table[k, SLOT] >> 16, start, end)
        for i in range(lo, hi):
            gfn = t.gfn[row] + (np.int64(i) << (9 * (level - 1)))
            if is_leaf(t.sptes[row, i], level) and gfn >= start and _may_collapse(s, h, m, k, gfn, level):
                drop_entry(t, m, row, i)
                done += 1
    t.meta[COLLAPSED] += done
    if m.flush_each:
        t.meta[FLUSHES] += done
    return done
