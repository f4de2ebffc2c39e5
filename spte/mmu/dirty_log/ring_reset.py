"""Reset of dirty rings: free harvested entries and re-arm their pages, neighbours coalesced into 64-gfn masks."""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import is_shared, swap
from spte._numba.jit import kernel, kernel_noinline
from spte.bits import ONE, U64, ZERO
from spte.mmu.dirty_log.pt_masked import rearm
from spte.mmu.mark_dirty import SLOT_SHIFT, U32_MASK

HARVESTED = U64(2)
FLAGS_MASK = U64(0xFFFF_FFFF)
AS_SHIFT = 16  # of a slot number


@kernel_noinline
def _rearm(t, spaces, m, roots, slot, offset, mask):
    """Re-arm one mask: KVM's kvm_reset_dirty_gfn. A slot or offset that does not exist (userspace may write the ring) is passed over."""
    if slot >> AS_SHIFT >= 2:
        return 0
    s, under = (spaces[1], roots[1]) if slot >> AS_SHIFT else (spaces[0], roots[0])
    last = np.int64(63)
    while (mask >> U64(last)) == ZERO:
        last -= 1
    for k in range(s.memslots[0].used_slots):
        if s.slots[k].id == slot:
            if offset < 0 or offset + last >= s.slots[k].npages:
                return 0
            changed, _ = rearm(t, s, m, under, k, s.slots[k].base_gfn + offset, mask, np.int64(-1))
            return changed
    return 0


@kernel
def reset_ring(t, spaces, mode, v, roots):
    """Free the harvested entries of one ring from its reset index on: KVM's kvm_dirty_ring_reset.

    `spaces` and `roots` are memslots and valid TDP roots by address space, two each. Returns ``(entries freed, SPTEs changed)``.
    """
    m = mode[0]
    vcpu = v.vcpu[0]
    freed, changed = 0, 0
    slot, base, mask = np.int64(-1), np.int64(0), ZERO
    while freed < vcpu.ring_size:
        i = vcpu.reset_index & (vcpu.ring_size - 1)
        head = v.ring[i, 0]
        if (head & HARVESTED) == ZERO:
            break
        next_slot = np.int64(head >> SLOT_SHIFT)
        offset = np.int64(v.ring[i, 1])
        if is_shared(t):  # before the vCPU may push there again
            swap(v.ring, 2 * i, head & ~FLAGS_MASK)
        else:
            v.ring[i, 0] = head & ~FLAGS_MASK
        vcpu.reset_index = (vcpu.reset_index + 1) & U32_MASK
        freed += 1
        if mask != ZERO and next_slot == slot:
            delta = offset - base
            if 0 <= delta < 64:
                mask |= ONE << U64(delta)
                continue
            if -64 < delta < 0 and ((mask << U64(-delta)) >> U64(-delta)) == mask:
                base = offset
                mask = (mask << U64(-delta)) | ONE
                continue
        if mask != ZERO:
            changed += _rearm(t, spaces, m, roots, slot, base, mask)
        slot, base, mask = next_slot, offset, ONE
    if mask != ZERO:
        changed += _rearm(t, spaces, m, roots, slot, base, mask)
    return freed, changed


@kernel
def reset_ring_shared(t, spaces, mode, v, roots):
    """As `reset_ring`, with `SharedTables`, beside vCPUs."""
    return reset_ring(t, spaces, mode, v, roots)
