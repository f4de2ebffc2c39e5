"""Draining a vCPU's PML buffer: KVM's vmx_flush_pml_buffer."""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import is_shared
from spte._numba.jit import helper, kernel_noinline
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.bits import SHIFT_PAGE, U64
from spte.kernels._pml_flush import EMPTY, first_logged, mark_run
from spte.mmu.mark_dirty import mark_dirty
from spte.mmu.memslot import find_slot


@helper
def _mark_in_bitmaps(t, s, v, first):
    """Mark the entries from `first` on where their order does not show; a slot is looked up when a gfn leaves the one before."""
    at = first
    while at < 512:
        k = find_slot(s, np.int64(v.pml[at] >> SHIFT_PAGE))
        if k < 0 or s.slots[k].flags & LOG_DIRTY_PAGES == 0:
            at += 1
            continue
        start, base, npages = U64(s.slots[k].dirty_bitmap), s.slots[k].base_gfn, U64(s.slots[k].npages)
        end, _ = mark_run(v.pml, at, np.int64(512), s.words, start, base, npages, is_shared(t))
        t.kvm[0].dirty_marks += end - at
        at = end


@helper
def drain(t, s, v, m):
    """Mark every logged gfn dirty and empty the buffer: KVM's vmx_flush_pml_buffer. Entries of slots that do not log are dropped."""
    vcpu = v.vcpu[0]
    if vcpu.pml_index != EMPTY:
        if vcpu.pml_barred:  # the buffer is L1's, and L2 ran
            vcpu.pml_index = EMPTY
        else:
            _drain(t, s, v, m)


@kernel_noinline
def _drain(t, s, v, m):
    vcpu = v.vcpu[0]
    first = first_logged(vcpu.pml_index)
    if vcpu.ring_size == 0 and v.log.shape[0] == 0:
        _mark_in_bitmaps(t, s, v, first)
    else:
        for j in range(512 - first):
            at = 511 - j if m.oldest_first else first + j
            gfn = np.int64(v.pml[at] >> SHIFT_PAGE)
            mark_dirty(t, s, v, find_slot(s, gfn), gfn)
    vcpu.pml_index = EMPTY
