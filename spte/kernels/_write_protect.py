"""Write-protect: take W from leaves, keep MMU_WRITABLE, so that the next write faults and is seen.

The caller must be exclusive on the tables and must flush.
"""

from __future__ import annotations

from typing import SupportsIndex

from spte._numba.jit import kernel
from spte.arrays.records import U64s
from spte.bits import W_SHIFT
from spte.kernels._check import changed, level_of
from spte.kernels._entries import clear_entries


@kernel
def _write_protect(sptes, huge):
    return clear_entries(sptes, 0, sptes.shape[0], W_SHIFT, W_SHIFT, huge, False)


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
