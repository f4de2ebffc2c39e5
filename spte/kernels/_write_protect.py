"""Write-protect: take W from leaves, keep MMU_WRITABLE, so that the next write faults and is seen.

The caller must be exclusive on the tables and must flush.
"""

from __future__ import annotations

from typing import SupportsIndex

from spte._numba.jit import kernel
from spte.arrays.records import U64s
<<<<<<< f72c9dbc1784c216e756c4aa38cac6e8a1ec11cc
from spte.bits import W_SHIFT
from spte.kernels._check import changed, level_of
from spte.kernels._entries import clear_entries


@kernel
def _write_protect(sptes, huge):
    return clear_entries(sptes, 0, sptes.shape[0], W_SHIFT, W_SHIFT, huge)
=======
from spte.bits import LARGE_SHIFT, ONE, PRESENT_SHIFT, U64, W_SHIFT, WRITABLE, ZERO, is_leaf
from spte.kernels._check import rows
from spte.mmu.slot.sweep import place


@helper
def protect_entries(sptes, row, lo, hi, huge):
    """Take W from the present leaves ``sptes[row, lo:hi]``; `huge`: only entries with LARGE are leaves."""
    # Two indices and arithmetic instead of branches: 1.2-1.4x of np.bitwise_and; a row view with branches took 1.7x.
    changed = ZERO
    if huge:
        for j in range(U64(lo), U64(hi)):
            s = sptes[row, j]
            w = (s >> W_SHIFT) & (s >> PRESENT_SHIFT) & (s >> LARGE_SHIFT) & ONE
            changed += w
            sptes[row, j] = s ^ (w << W_SHIFT)
    else:
        for j in range(U64(lo), U64(hi)):
            s = sptes[row, j]
            w = (s >> W_SHIFT) & (s >> PRESENT_SHIFT) & ONE
            changed += w
            sptes[row, j] = s ^ (w << W_SHIFT)
    return np.int64(changed)


@kernel
def count_protected(t, as_id, start, end, min_level):
    """Count the TDP MMU's leaves of level >= `min_level` for gfns ``[start, end)`` that have no W: old kernels write them again."""
    count = 0
    for row in range(t.kvm[0].rows):
        if t.pages[row].level >= min_level and t.pages[row].shadow == 0:
            lo, hi = place(t, row, as_id, start, end)
            for i in range(lo, hi):
                spte = t.sptes[row, i]
                count += is_leaf(spte, t.pages[row].level) and (spte & WRITABLE) == ZERO
    return count


@kernel
def _all(sptes, huge):
    changed = 0
    for row in range(sptes.shape[0]):
        changed += protect_entries(sptes, row, 0, sptes.shape[1], huge)
    return changed
>>>>>>> 9da19d85d5939b403bf8a236c475c63f4abda36e


def write_protect(sptes: U64s, level: SupportsIndex = 1) -> int:
    """Take W (bit 1) from every present leaf, as KVM's kvm_mmu_slot_remove_write_access does.

    The caller must flush TLBs if the result is not 0.

    Parameters
    ----------
    sptes : ndarray of uint64, any shape, C-contiguous
        Page-table entries of one level; mutated. Entries without MMU_PRESENT (bit 11) stay as they are.
    level : int
        Level of the entries: at 2 and 3 only entries with LARGE (bit 7) are leaves.

    Returns
    -------
    int
        SPTEs changed.

    Raises
    ------
    TypeError, ValueError
        `sptes` is not uint64, not C-contiguous or read-only, or `level` is not 1, 2 or 3. Nothing is changed.
    """
    huge = level_of(level) > 1
    return int(_write_protect(changed(sptes, "sptes").reshape(-1), huge))
