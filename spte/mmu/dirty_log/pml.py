"""Draining a vCPU's PML buffer: what a guest run and the public flush share."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_apart, prefetch
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.bits import ONE, SHIFT_PAGE, U64
from spte.mmu.mark_dirty import mark_dirty
from spte.mmu.memslot import find_slot

WORD_SHIFT, WORD_MASK = U64(6), U64(63)
AHEAD, LAST = U64(32), U64(511)  # entries


@kernel_apart
def _mark_run(words, pml, first, base, npages, start):
    """Mark entries from `first` on in the bitmap that starts at word `start`; returns the first whose gfn is not in its slot, else 512."""
    # With the lookup of the slot in this loop it took 1.5 times as long, with the words of a whole buffer asked for before it 1.2.
    for at in range(U64(first), U64(512)):
        ahead = U64(np.int64(pml[min(at + AHEAD, LAST)] >> SHIFT_PAGE) - base)
        prefetch(words, np.int64(start + (ahead >> WORD_SHIFT)))
        offset = U64(np.int64(pml[at] >> SHIFT_PAGE) - base)  # before its slot: wraps, and is past its end
        if offset >= npages:
            return np.int64(at)
        words[start + (offset >> WORD_SHIFT)] |= ONE << (offset & WORD_MASK)
    return np.int64(512)


@helper
def _mark_in_bitmaps(t, s, v, first):
    """Mark the entries from `first` on where their order does not show; a slot is looked up when a gfn leaves the one before."""
    at = first
    while at < 512:
        k = find_slot(s, np.int64(v.pml[at] >> SHIFT_PAGE))
        if k < 0 or s.slots[k].flags & LOG_DIRTY_PAGES == 0:
            at += 1
            continue
        end = _mark_run(s.words, v.pml, at, s.slots[k].base_gfn, U64(s.slots[k].npages), U64(s.slots[k].dirty_bitmap))
        t.kvm[0].dirty_marks += end - at
        at = end


@helper
def drain(t, s, v, m):
    """Mark every logged gfn dirty and empty the buffer; entries of slots that do not log are dropped."""
    vcpu = v.vcpu[0]
    if vcpu.pml_index != 511:
        if vcpu.pml_barred:  # the buffer is L1's, and L2 ran
            vcpu.pml_index = 511
        else:
            _drain(t, s, v, m)


@kernel_apart
def _drain(t, s, v, m):
    vcpu = v.vcpu[0]
    index = vcpu.pml_index
    first = np.int64(0) if index > 511 else index + 1
    if vcpu.ring_size == 0 and v.log.shape[0] == 0:
        _mark_in_bitmaps(t, s, v, first)
    else:
        for j in range(512 - first):
            at = 511 - j if m.oldest_first else first + j
            gfn = np.int64(v.pml[at] >> SHIFT_PAGE)
            mark_dirty(t, s, v, find_slot(s, gfn), gfn)
    vcpu.pml_index = 511
