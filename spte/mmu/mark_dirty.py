"""Mark a gfn dirty, in the bitmap of its slot or the ring of the running vCPU: KVM's mark_page_dirty_in_slot."""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import fetch_or, is_shared, load, store
from spte._numba.jit import helper, kernel_noinline, kernel_noinline_entry
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.arrays.vcpu import EV_MARK, EV_PUSH, LOG_COLUMNS
from spte.bits import ONE, U64, ZERO

U32_MASK = np.int64(0xFFFF_FFFF)


RING_GFN_DIRTY = ONE


SLOT_SHIFT = U64(32)


@kernel_noinline
def note(v, kind, a, b, c, d, e):
    """Append an event to the vCPU's log, if one is kept."""
    vcpu = v.vcpu[0]
    n = vcpu.logged
    if n < v.log.shape[0]:
        v.log[n, 0] = U64(kind)
        v.log[n, 1] = U64(a)
        v.log[n, 2] = U64(b)
        v.log[n, 3] = U64(c)
        v.log[n, 4] = U64(d)
        v.log[n, LOG_COLUMNS - 1] = U64(e)
        vcpu.logged = n + 1


@kernel_noinline
def ring_push(v, slot, offset):
    """Push an entry on the vCPU's dirty ring; asks for an exit from the soft limit on."""
    vcpu = v.vcpu[0]
    dirty = vcpu.dirty_index
    i = dirty & (vcpu.ring_size - 1)
    v.ring[i, 1] = U64(offset)
    store(v.ring, 2 * i, (U64(slot) << SLOT_SHIFT) | RING_GFN_DIRTY)  # userspace reads the ring while the guest runs
    dirty = (dirty + 1) & U32_MASK
    vcpu.dirty_index = dirty
    used = (dirty - vcpu.reset_index) & U32_MASK
    if used >= vcpu.soft_limit:
        vcpu.ring_soft_full = 1
    if v.log.shape[0] > 0:
        note(v, EV_PUSH, dirty, vcpu.reset_index, slot, offset, used)


@helper
def _set_bit(t, words, w, bit):
    if not is_shared(t):
        words[w] |= bit
    elif (load(words, w) & bit) == ZERO:  # a set bit is set after the SPTE was changed: it need not be set again
        fetch_or(words, w, bit)


@kernel_noinline_entry
def mark_dirty(t, s, v, k, gfn):
    """Mark `gfn` of slot `k` dirty in the running vCPU's ring or the slot's bitmap; ignored if the slot does not log."""
    if v.log.shape[0] > 0:
        note(v, EV_MARK, gfn, 0, 0, 0, 0)
    if k < 0 or s.slots[k].flags & LOG_DIRTY_PAGES == 0:
        return
    t.kvm[0].dirty_marks += 1
    offset = gfn - s.slots[k].base_gfn
    if v.vcpu[0].ring_size > 0:
        ring_push(v, s.slots[k].id, offset)
    elif s.slots[k].dirty_bitmap >= 0:
        _set_bit(t, s.words, s.slots[k].dirty_bitmap + (offset >> 6), ONE << U64(offset & 63))
