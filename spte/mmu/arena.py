"""The arena: page-table pages as rows of one uint64 array, made on demand, freed, reused.

Free rows have level 0, so that a sweep in arena order passes over them.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays import reserve as memory
from spte.arrays.context import FREED, HARVEST_WORDS, META_COLUMNS, PAGES_4K, ROWS, Tables, zeros
from spte.bits import U64, ZERO

# 2**24 rows map 32 TiB in 4 KiB pages. Only address space: 64 GiB and 0.5 GiB of attributes, nothing of it touched.
CAPACITY = 1 << 24
HASH_BUCKETS = 1 << 16
MAX_TDP_ROOTS = 4  # one for L1, one for L2 without its own EPT or NPT
LEAF_ROWS = 1 << 23  # 2 MiB each: 16 TiB of a guest


def new_tables(capacity: int = CAPACITY) -> Tables:
    """Return an empty arena of at most `capacity` rows (fewer where the host refuses the address space)."""
    sptes = memory.reserve(np.uint64, capacity, 512, huge=True)
    n = len(sptes)
    res = memory.reserve
    return Tables(
        sptes, level=res(np.uint8, n), gfn=res(np.int64, n), role=res(np.uint32, n), parent=res(np.int32, n),
        nx_disallowed=res(np.uint8, n), shadow=res(np.uint8, n), hash=res(np.int32, HASH_BUCKETS), hash_next=res(np.int32, n),
        shadowed=res(np.uint64, n, 512), unsync=res(np.uint8, n), flood=res(np.uint8, n), held=res(np.uint16, n), parents=res(np.int64, n),
        roots=zeros(MAX_TDP_ROOTS), doomed=res(np.int32, n), path=zeros(16),
        free=res(np.int32, n), meta=zeros(META_COLUMNS), places=zeros(64 * HARVEST_WORDS + 1, np.uint64),
        flat=sptes.reshape(-1), leaf_rows=res(np.uint32, LEAF_ROWS), whole=res(np.uint8, n),
    )  # fmt: skip


@helper
def take_row(t, level, gfn, role, parent):
    """Take a row as it is; returns its number, -1 if the arena is full."""
    if t.meta[FREED] > 0:
        t.meta[FREED] -= 1
        row = np.int64(t.free[t.meta[FREED]])
    else:
        row = t.meta[ROWS]
        if row >= t.level.shape[0]:
            return np.int64(-1)
        t.meta[ROWS] = row + 1
    t.level[row] = level
    t.gfn[row] = gfn
    t.role[row] = role
    t.parent[row] = parent
    t.nx_disallowed[row] = 0
    t.shadow[row] = 0
    t.whole[row] = 0
    return np.int64(row)


@kernel
def alloc_row(t, level, gfn, role, parent, empty):
    """Take a row, fill it with `empty`; returns its number, -1 if the arena is full."""
    zeroed = t.meta[FREED] == 0
    row = take_row(t, level, gfn, role, parent)
    if row >= 0 and not (zeroed and empty == ZERO):
        for i in range(512):
            t.sptes[U64(row), i] = empty
    return row


@kernel
def free_row(t, row):
    """Give a row back."""
    t.level[row] = 0
    t.free[t.meta[FREED]] = row
    t.meta[FREED] += 1


@helper
def count_leaf(t, level, change):
    """Add `change` to the VM's count of leaves of `level`."""
    t.meta[PAGES_4K + level - 1] += change
