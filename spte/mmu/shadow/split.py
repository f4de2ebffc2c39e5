"""Eager split under the shadow MMU, which happens to L2's huge leaves while L1 is the TDP MMU's: larger ones first."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.bits import ACC_EXEC, LARGE, MMU_PRESENT, ROLE_ACCESS, ROLE_ACCESS_SHIFT, ROLE_IS_DIRECT, ROLE_LEVEL, SHIFT_PAGE, U64, ZERO
from spte.mmu.arena import count_leaf
from spte.mmu.make_spte import set_executable
from spte.mmu.rmap import head_of, ref_of, rmap_add
from spte.mmu.shadow.page import drop_leaf, entry_access, entry_gfn, find_page, link_page, new_page


@helper
def _split_page(t, s, m, k, row, i):
    """Replace a huge leaf of the shadow MMU by a link to a direct page with small leaves; False if the arena is full.

    The page may be there already, filled by another alias of the same gfns: what it maps stays.
    """
    kvm = t.kvm[0]
    huge = t.sptes[row, i]
    level = np.int64(t.pages[row].level) - 1
    gfn = entry_gfn(t, row, i)
    access = entry_access(t, row, i)
    above = np.int64(t.pages[row].role) & ~(ROLE_LEVEL | ROLE_ACCESS)
    role = above | ROLE_IS_DIRECT | level | (access << ROLE_ACCESS_SHIFT)
    child = find_page(t, s, m, gfn, level, role)
    if child < 0:
        child = new_page(t, s, m, gfn, level, role)
    if child < 0:
        return False
    step = SHIFT_PAGE + U64(9 * (level - 1))
    small = huge & ~LARGE if level == 1 else huge
    if level == 1 and m.nx and access & ACC_EXEC:
        small = set_executable(small, m.lay, True)
    for j in range(512):
        if (t.sptes[child, j] & MMU_PRESENT) == ZERO:
            t.sptes[child, j] = small + (U64(j) << step)
            rmap_add(s, k, gfn + (np.int64(j) << (9 * (level - 1))), level, child * 512 + j)
            count_leaf(t, level, 1)
            kvm.sptes_written += 1
    drop_leaf(t, s, m, row, i)
    link_page(t, s, m, row, i, child)
    kvm.splits[level] += 1
    kvm.remote_tlb_flush_requests += 1
    return True


@kernel_noinline
def split_rmaps(t, s, m, k, start, end):
    """Split the huge leaves of the shadow MMU that map gfns ``[start, end)`` of slot `k`, best effort, with a flush each.

    Returns leaves split.
    """
    done = 0
    for level in (np.int64(3), np.int64(2)):
        span = np.int64(1) << (9 * (level - 1))
        gfn = start & -span
        while gfn < end:
            at = head_of(s, k, max(gfn, start), level)
            while s.rmaps[at] != 0:
                ref = ref_of(s, s.rmaps[at])
                if not _split_page(t, s, m, k, ref >> 9, ref & 511):
                    return done
                done += 1
            gfn += span
    return done
