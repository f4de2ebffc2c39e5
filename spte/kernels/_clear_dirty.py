"""Clear-dirty: take from each leaf the bit that its next write sets again - D, or W where a write is seen by its fault.

The caller must be exclusive on the tables and must flush: a TLB that caches D=1 logs nothing.
"""

from __future__ import annotations

from typing import SupportsIndex

from spte._numba.jit import kernel
from spte.arrays.records import U64s
from spte.bits import W_SHIFT
from spte.kernels._check import changed, level_of
from spte.kernels._entries import clear_entries
from spte.kernels._layout import AnyPlatform, resolve


@kernel
def _clear_dirty(sptes, dirty_shift, huge):
    return clear_entries(sptes, 0, sptes.shape[0], dirty_shift, W_SHIFT, huge, False)


def clear_dirty(sptes: U64s, level: SupportsIndex = 1, *, platform: AnyPlatform = "ept-pml") -> int:
    """Clear D in every present leaf, W where the A/D type (bits 53:52) is not 0: KVM's kvm_mmu_slot_leaf_clear_dirty.

    The caller must flush TLBs if the result is not 0. KVM does this as logging begins, and only where PML logs the setting of D. So
    unlike `harvest` it clears D on every platform, with PML or not: bit 9 with EPT, bit 6 with NPT and shadow paging. Without PML
    nobody sees that D is set, and writes are lost: take `write_protect` there.

    Parameters
    ----------
    sptes : ndarray of uint64, any shape, C-contiguous
        Page-table entries of one level; mutated.
    level : int
        Level of the entries: at 2 and 3 only entries with LARGE (bit 7) are leaves.
    platform : str, Platform or KernelLayout
        Says where D lies; what `spte.kernels.layout` returns saves the look-up.

    Returns
    -------
    int
        SPTEs changed.

    Raises
    ------
    TypeError, ValueError
        `sptes` is not uint64, not C-contiguous or read-only, `level` is not 1, 2 or 3, or `platform` is no platform. Nothing is changed.
    PlatformError
        The platform is not known.
    """
    huge, shift = level_of(level) > 1, resolve(platform).dirty_shift
    return int(_clear_dirty(changed(sptes, "sptes").reshape(-1), shift, huge))
