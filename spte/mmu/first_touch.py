"""A run of first touches: consecutive gfns that fault alike, mapped as one, counted as many. Exactly what single faults do."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel_noinline
from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.arrays.vcpu import WRITE
from spte.bits import ACC_ALL, SHIFT_PAGE, U64, ZERO
from spte.host.pages import MIXED, OWN, PAGE_NONE, PAGE_OWN, SHM, drop_mixed
from spte.mmu.arena import count_leaf
from spte.mmu.make_spte import make_leaf
from spte.mmu.memslot import find_slot


@kernel_noinline
def first_touches(t, s, h, v, m, gfns, at, kind, row, i):
    """Map the gfns from ``gfns[at]`` on as far as they are consecutive and not present from entry `i` of level-1 table `row` on.

    Only for a plain slot without logging and memory that the host maps at 4 KiB. Returns how many; 0: fault one by one.
    """
    gfn = np.int64(gfns[at])
    k = find_slot(s, gfn)
    if k < 0 or s.slots[k].flags & (LOG_DIRTY_PAGES | READONLY):
        return 0
    hpage = s.slots[k].hpage + gfn - s.slots[k].base_gfn
    block, page = hpage >> 9, hpage & 511
    mixed = h.blocks[block].state == MIXED
    if not (h.blocks[block].state == OWN or (mixed and kind == WRITE and h.kinds[block] != SHM)):
        return 0
    most = min(gfns.shape[0] - at, 512 - max(i, page), s.slots[k].base_gfn + s.slots[k].npages - gfn)
    other = ZERO
    for j in range(U64(most)):
        other |= U64(gfns[U64(at) + j]) ^ (U64(gfn) + j)
        other |= t.sptes[U64(row), U64(i) + j] ^ m.lay.nonpresent
    count = most if other == ZERO else np.int64(0)
    while count < most and gfns[at + count] == gfn + count and t.sptes[row, i + count] == m.lay.nonpresent:
        count += 1
    if mixed:
        states = h.blocks[block].row
        some = np.int64(0)
        while some < count and h.page[states, page + some] == PAGE_NONE:
            h.page[states, page + some] = PAGE_OWN
            some += 1
        count = some
        h.mixed_blocks[states].own_pages += np.int32(count)
        if h.mixed_blocks[states].own_pages == 512:
            drop_mixed(h, block, OWN)
    leaf = make_leaf(m, np.int64(1), U64(hpage), ZERO, False, True, np.int64(t.pages[row].role), np.int64(ACC_ALL), True)
    for j in range(U64(count)):
        t.sptes[U64(row), U64(i) + j] = leaf + (j << SHIFT_PAGE)
    count_leaf(t, np.int64(1), count)
    t.kvm[0].sptes_written += count
    vcpu = v.vcpu[0]
    vcpu.exits += count
    vcpu.violations += count
    vcpu.pf_taken += count
    vcpu.pf_fixed += count
    vcpu.slow_faults += count
    return count
