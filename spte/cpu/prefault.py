"""Prefault: map pages before the guest asks for them, leaves not accessed yet."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.arrays.vcpu import DONE, READ
from spte.mmu.memslot import find_slot
from spte.mmu.page_fault import Fault, fast_page_fault, map_gfn
from spte.mmu.shadow.page_fault import shadow_map_gfn
from spte.mmu.walk import walk


@kernel
def prefault(t, s, h, v, mode, gfn):
    """Map `gfn` as a read would; returns ``(exit reason, level of the entry)``. Counts no fault, but a fast one."""
    m = mode[0]
    vcpu = v.vcpu[0]
    k = find_slot(s, gfn)
    # Without A/D bits a fault on an absent entry may be fast, and a prefault counts as one: what may be read stays as it is.
    may_be_fast = k >= 0 and (m.fast_fault or m.shadow) and not m.ad
    row, i, level = walk(t, vcpu.root, gfn)
    f = Fault(gfn, gfn, k, np.int64(READ), True, False, row, i, level)
    if may_be_fast and fast_page_fault(t, s, v, m, f):
        reason = DONE
    elif m.shadow:
        reason = shadow_map_gfn(t, s, h, v, m, f)
    else:
        reason = map_gfn(t, s, h, v, m, f)
    _, _, level = walk(t, vcpu.root, gfn)
    return reason, level
