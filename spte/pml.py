"""Draining a vCPU's PML buffer: what a guest run and the public flush share."""

from __future__ import annotations

import numpy as np

from spte import context as cx
from spte._jit import helper, kernel_apart, prefetch
from spte.bits import ONE, SHIFT_PAGE, U64
from spte.slots import find_slot, mark_dirty

WORD_SHIFT, WORD_MASK = U64(6), U64(63)


@helper
def _mark_in_bitmaps(t, s, v, first):
    """Mark the entries from `first` on where their order does not show; a slot is looked up when a gfn leaves the one before."""
    marks = 0
    base = npages = words = np.int64(0)
    k = find_slot(s, np.int64(v.pml[511] >> SHIFT_PAGE))
    if k >= 0:
        for at in range(U64(first), U64(512)):
            offset = np.int64(v.pml[at] >> SHIFT_PAGE) - s.table[k, cx.BASE]
            prefetch(s.words, s.table[k, cx.BITMAP] + (offset >> 6))
    for at in range(U64(first), U64(512)):
        gfn = np.int64(v.pml[at] >> SHIFT_PAGE)
        if not base <= gfn < base + npages:
            k = find_slot(s, gfn)
            if k < 0 or s.table[k, cx.FLAGS] & cx.LOG_DIRTY_PAGES == 0:
                continue
            base, npages, words = s.table[k, cx.BASE], s.table[k, cx.NPAGES], s.table[k, cx.BITMAP]
        offset = U64(gfn - base)
        s.words[U64(words) + (offset >> WORD_SHIFT)] |= ONE << (offset & WORD_MASK)
        marks += 1
    t.meta[cx.DIRTY_MARKS] += marks


@helper
def drain(t, s, v, m):
    """Mark every logged gfn dirty and empty the buffer; entries of slots that do not log are dropped."""
    if v.reg[cx.PML_INDEX] != 511:
        if v.reg[cx.PML_BARRED]:  # the buffer is L1's, and L2 ran
            v.reg[cx.PML_INDEX] = 511
        else:
            _drain(t, s, v, m)


@kernel_apart
def _drain(t, s, v, m):
    index = v.reg[cx.PML_INDEX]
    first = np.int64(0) if index > 511 else index + 1
    if v.reg[cx.RING_SIZE] == 0 and v.log.shape[0] == 0:
        _mark_in_bitmaps(t, s, v, first)
    else:
        for j in range(512 - first):
            at = 511 - j if m.oldest_first else first + j
            gfn = np.int64(v.pml[at] >> SHIFT_PAGE)
            mark_dirty(t, s, v, find_slot(s, gfn), gfn)
    v.reg[cx.PML_INDEX] = 511
