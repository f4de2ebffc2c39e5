"""Eager split of a slot's huge leaves: KVM's kvm_mmu_slot_try_split_huge_pages."""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.mmu.dirty_log.pt_masked import split_range


@kernel
def split_slot(t, mode, roots, start, end):
    """Split every huge leaf of gfns ``[start, end)`` to 4 KiB under each root: KVM's kvm_mmu_slot_try_split_huge_pages.

    Best effort: it ends where the arena is full. Returns leaves split.
    """
    m = mode[0]
    done = 0
    for r in range(roots.shape[0]):
        done += split_range(t, m, roots[r], start, end)
    return done
