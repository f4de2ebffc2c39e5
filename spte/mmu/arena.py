"""The arena: page-table pages as rows of one uint64 array, made on demand, freed, reused.

Free rows have level 0, so that a sweep in arena order passes over them.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays import reserve as memory
from spte.arrays.tables import HARVEST_WORDS, KVM, KVM_MMU_PAGE, Tables
from spte.bits import U64, ZERO

# 2**24 rows map 32 TiB in 4 KiB pages. Only address space: 64 GiB and 0.5 GiB of attributes, nothing of it touched.
CAPACITY = 1 << 24
HASH_BUCKETS = 1 << 16
LEAF_ROWS = 1 << 23  # 2 MiB each: 16 TiB of a guest


def new_tables(capacity: int = CAPACITY) -> Tables:
    """Return an empty arena of at most `capacity` rows (fewer where the host refuses the address space)."""
    sptes = memory.reserve(np.uint64, capacity, 512, huge=True)
    n = len(sptes)
    res = memory.reserve
    return Tables(
        sptes, flat=sptes.reshape(-1), pages=res(KVM_MMU_PAGE, n), kvm=np.zeros(1, KVM), hash=res(np.int32, HASH_BUCKETS),
        shadowed=res(np.uint64, n, 512), doomed=res(np.int32, n), places=np.zeros(64 * HARVEST_WORDS + 1, np.uint64),
        leaf_rows=res(np.uint32, LEAF_ROWS),
    )  # fmt: skip


@helper
def take_row(t, level, gfn, role):
    """Take a row as it is; returns its number, -1 if the arena is full."""
    kvm = t.kvm[0]
    row = kvm.free_row - 1
    if row >= 0:
        kvm.free_row = t.pages[row].parent_ptes
    else:
        row = kvm.rows
        if row >= t.pages.shape[0]:
            return np.int64(-1)
        kvm.rows = row + 1
    page = t.pages[row]
    page.level = level
    page.gfn = gfn
    page.role = role
    page.parent_ptes = 0
    page.nx_huge_page_disallowed = 0
    page.shadow = 0
    page.full = 0
    return np.int64(row)


@kernel
def alloc_row(t, level, gfn, role, empty):
    """Take a row, fill it with `empty`; returns its number, -1 if the arena is full."""
    zeroed = t.kvm[0].free_row == 0
    row = take_row(t, level, gfn, role)
    if row >= 0 and not (zeroed and empty == ZERO):
        for i in range(512):
            t.sptes[U64(row), i] = empty
    return row


@kernel
def free_row(t, row):
    """Give a row back."""
    kvm = t.kvm[0]
    t.pages[row].level = 0
    t.pages[row].parent_ptes = kvm.free_row
    kvm.free_row = row + 1


@helper
def count_leaf(t, level, change):
    """Add `change` to the VM's count of leaves of `level`."""
    t.kvm[0].pages[level - 1] += change
