"""The arena of page-table pages, one record a page, and the VM's counters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte._numba.atomics import Shared
from spte.arrays.records import Records, U64s, columns, record

PAE_ROOT = 2  # `shadow` of a vCPU's PAE root
MAX_TDP_ROOTS = 4  # one for L1, one for L2 without its own EPT or NPT
PATH = 8  # levels of a walk over pages
HARVEST_WORDS = 2048  # words of a dirty bitmap looked at together: 131072 gfns

KVM_MMU_PAGE = record("kvm_mmu_page", [
    ("gfn", "i8"),  # first gfn that the page maps; of a page that shadows a guest table that table's
    ("parent_ptes", "i8"),  # head of the entries that link to it, as `spte.mmu.rmap` has them; of a free row the next free row + 1
    ("role", "u4"),
    ("hash_link", "i4"),  # next row + 1 of the hash bucket
    ("root_count", "u2"),  # vCPUs that hold the page as a root
    ("level", "u1"),  # level of its entries; 0: the row is free
    ("shadow", "u1"),  # 1: it belongs to the shadow MMU, whose leaves stand in rmaps; PAE_ROOT
    ("nx_huge_page_disallowed", "u1"),  # 1: linked by an exec fault under the NX mitigation, 2: and a huge page would fit
    ("unsync", "u1"),  # 1: the guest may write the table that it shadows
    ("write_flooding_count", "u1"),  # emulated writes to that table since it was last used
    ("full", "u1"),  # 1: each entry of the level-1 page is a leaf; 0: not known
])  # fmt: skip

KVM = record("kvm", [
    *columns("i8", "rows", "free_row", "freed"),  # rows in use, ever; first of the freed ones + 1; rows freed, ever
    ("pages", "i8", (3,)),  # leaves by level: pages_4k, pages_2m, pages_1g
    ("splits", "i8", (3,)),  # huge leaves split, by level
    *columns("i8", "remote_tlb_flush_requests", "nx_lpage_splits", "sptes_written", "zapped", "collapsed", "dirty_marks"),
    *columns("i8", "cpu_dirty_logging_requests", "vcpu_kicks"),
    *columns("i8", "indirect_shadow_pages", "mmu_unsync"),  # pages that shadow guest tables; those of them that are unsync
    ("needbreak", "i8"),  # another thread waits for the VM: rwlock_needbreak
    ("nr_tdp_mmu_roots", "i8"),
    ("tdp_mmu_roots", "i8", (MAX_TDP_ROOTS,)),  # rows of the TDP MMU's valid roots of address space 0
    ("path", "i8", (2 * PATH,)),  # scratch of a walk over the pages below a root
])  # fmt: skip


_COUNTED = ("pages", "splits", "remote_tlb_flush_requests", "nx_lpage_splits", "sptes_written", "zapped", "collapsed", "dirty_marks")
COUNTERS = np.zeros(KVM.itemsize // 8, bool)  # words of KVM that count what kernels do
for _name in _COUNTED:
    _field, _at = KVM.fields[_name][:2]  # type: ignore[index]
    COUNTERS[_at // 8 : (_at + _field.itemsize) // 8] = True


class Tables(NamedTuple):
    """The page tables of a VM. A row number is its frame number."""

    sptes: U64s  # [capacity, 512]
    flat: U64s  # `sptes` as one row: entry i of a row is at row * 512 + i
    pages: Records  # [capacity] KVM_MMU_PAGE
    kvm: Records  # [1] KVM
    hash: npt.NDArray[np.int32]  # shadow pages by gfn: first row + 1 of each bucket
    shadowed: U64s  # [capacity, 512] gfn << 3 | access of each entry of a page that shadows a guest table
    doomed: npt.NDArray[np.int32]  # scratch: pages to be zapped or synced
    places: U64s  # scratch of a harvest: places of entries that are to be re-armed
    leaf_rows: npt.NDArray[np.uint32]  # scratch of a run in the guest: level-1 table of each 2 MiB, 0: to be walked to


class SharedTables(Tables, Shared):
    """The same page tables for a kernel that runs beside others on them.

    Of a vCPU `kvm` and `leaf_rows` are its own: counts and freed rows, with no row beyond those.
    """
