"""Draining a vCPU's PML buffer: what a guest run and the public flush share."""

from __future__ import annotations

import numpy as np

from spte._jit import kernel
from spte.bits import SHIFT_PAGE
from spte.context import PML_INDEX
from spte.slots import find_slot, mark_dirty


@kernel
def drain(t, s, v, m):
    """Mark every logged gfn dirty and empty the buffer; entries of slots that do not log are dropped."""
    index = v.reg[PML_INDEX]
    if index == 511:
        return
    first = np.int64(0) if index > 511 else index + 1
    for j in range(512 - first):
        at = 511 - j if m.oldest_first else first + j
        gfn = np.int64(v.pml[at] >> SHIFT_PAGE)
        mark_dirty(t, s, v, find_slot(s, gfn), gfn)
    v.reg[PML_INDEX] = 511
