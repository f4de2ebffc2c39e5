"""The groups of arrays that travel into kernels, and the names of their columns. Python classes own them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spte.bits import GuestPaging, Layout

U64s = npt.NDArray[np.uint64]
I64s = npt.NDArray[np.int64]

READ, WRITE, EXEC = 0, 1, 2  # kinds of guest access
PAE_ROOT = 2  # Tables.shadow of a vCPU's PAE root


class Tables(NamedTuple):
    """The arena of page-table pages and what is known of each page. A row number is its frame number."""

    sptes: U64s  # [capacity, 512]
    level: npt.NDArray[np.uint8]  # level of the row's entries; 0 = row is free
    gfn: I64s  # first gfn that the row maps
    role: npt.NDArray[np.uint32]
    parent: npt.NDArray[np.int32]  # row that links to this one, -1 for a root
    nx_disallowed: npt.NDArray[np.uint8]  # 1: linked by an exec fault under the NX mitigation, 2: and a huge page would fit
    shadow: npt.NDArray[np.uint8]  # 1: the row belongs to the shadow MMU, whose leaves stand in rmaps; PAE_ROOT
    hash: npt.NDArray[np.int32]  # shadow pages by gfn: first row + 1 of each bucket
    hash_next: npt.NDArray[np.int32]  # next row + 1 of the bucket
    shadowed: U64s  # [capacity, 512] gfn << 3 | access of each entry of a page that shadows a guest table
    unsync: npt.NDArray[np.uint8]  # 1: the guest may write the table that the row shadows
    flood: npt.NDArray[np.uint8]  # emulated writes to that table since it was last used
    held: npt.NDArray[np.uint16]  # vCPUs that hold the shadow page as a root
    parents: I64s  # heads of the entries that link to a shadow page, as `spte.mmu.rmap` has them
    roots: I64s  # rows of the TDP MMU's valid roots
    doomed: npt.NDArray[np.int32]  # scratch: pages to be zapped or synced
    path: I64s  # scratch of a walk over the pages below a root
    free: npt.NDArray[np.int32]  # stack of freed rows
    meta: I64s  # ROWS, FREED, and the VM's counters below
    places: U64s  # scratch of a harvest: places of entries that are to be re-armed
    flat: U64s  # `sptes` as one row: an entry's place in it is row * 512 + index
    leaf_rows: npt.NDArray[np.uint32]  # scratch of a stay in the guest: level-1 table of each 2 MiB, 0: to be walked to
    whole: npt.NDArray[np.uint8]  # 1: each entry of the level-1 table is a leaf; 0: not known


# Columns of Tables.meta.
ROWS, FREED, PAGES_4K, PAGES_2M, PAGES_1G, FLUSHES, NX_SPLITS = 0, 1, 2, 3, 4, 5, 6
SPTES_WRITTEN, SPLITS_2M, SPLITS_1G, ZAPPED, COLLAPSED, DIRTY_MARKS = 7, 8, 9, 10, 11, 12
CPU_DIRTY_LOGGING_REQUESTS, VCPU_KICKS = 13, 14
TDP_ROOTS, INDIRECT, UNSYNC = 15, 16, 17  # valid roots in `roots`; pages that shadow guest tables; those of them that are unsync
META_COLUMNS = 18
HARVEST_WORDS = 2048  # words of a dirty bitmap looked at together: 131072 gfns


class Slots(NamedTuple):
    """Memslots of one address space, ascending by base gfn; columns below."""

    table: I64s  # [slots, SLOT_COLUMNS]
    meta: I64s  # COUNT, LAST_HIT, GENERATION
    words: U64s  # pool of dirty bitmaps, [live | scratch] a slot
    disallow: npt.NDArray[np.int32]  # pool of lpage_info counters
    rmaps: I64s  # pool of rmap heads
    nodes: I64s  # [n, 2] chains of rmaps with more than one SPTE
    node_meta: I64s  # NODE_HIGH, NODE_FREE


# Columns of Slots.table: base gfn, pages, flags, as_id<<16|id, first word of the bitmap (-1: none), first counter of level 2 and
# of level 3, host page number of the first page.
# rmap heads of level 1, 2, 3 (-1: the slot has none).
BASE, NPAGES, FLAGS, SLOT, BITMAP, LPAGE2, LPAGE3, HPAGE, RMAP1 = 0, 1, 2, 3, 4, 5, 6, 7, 8
SLOT_COLUMNS = 11
NODE_HIGH, NODE_FREE = 0, 1
COUNT, LAST_HIT, GENERATION = 0, 1, 2
LOG_DIRTY_PAGES, READONLY = 1, 2
BEGAN_SET = 1 << 17  # internal: logging began with every bit set, so huge leaves may be writable until CLEAR
UNARMED = 1 << 18  # internal: and initially-set was turned off since, so that CLEAR passes over them: KVM may lose writes


class Host(NamedTuple):
    """The host's mappings by host page number; see `spte.host.pages` for the states."""

    kind: npt.NDArray[np.uint8]  # backing kind of each 2 MiB block
    device: npt.NDArray[np.uint8]  # 1: device memory (DAX)
    block: npt.NDArray[np.uint8]  # state of each 2 MiB block
    mixed: npt.NDArray[np.int32]  # row of `page` of a block in state MIXED
    page: npt.NDArray[np.uint8]  # [rows, 512] states of single pages
    own_pages: npt.NDArray[np.int32]  # pages of each row of `page` that are own and writable
    meta: I64s  # rows of `page` in use, rows freed
    free: npt.NDArray[np.int32]  # stack of freed rows of `page`
    alone: U64s  # [blocks, 8] a bit a page of THP memory that is no part of a huge page: it was dropped alone
    words_of: npt.NDArray[np.int32]  # row + 1 of `words_page` of a block some of whose pages have contents
    words_page: npt.NDArray[np.int32]  # [rows, 512] row + 1 of `words`
    words: U64s  # [rows, 512] contents of the pages that hold guest page tables


class Vcpu(NamedTuple):
    """One vCPU: registers, counters, PML buffer, dirty ring, event log."""

    reg: I64s
    stat: I64s
    pml: U64s  # [512]
    ring: U64s  # [entries, 2]: flags | slot << 32, offset
    log: U64s  # [n, LOG_COLUMNS]; n == 0: nothing is recorded
    walked: U64s  # places of the entries where the walks of the next accesses ended
    guest: I64s  # the last walk of guest page tables, columns below


# Columns of Vcpu.reg.
PML_ON, PML_INDEX, RING_SIZE, RING_DIRTY, RING_RESET, RING_SOFT, RING_FULL_REQUEST = 0, 1, 2, 3, 4, 5, 6
ROOT, EXIT_REASON, LOGGED, EXIT_GFN = 7, 8, 9, 10
PGD, STORE, AHEAD, STAY = 11, 12, 13, 14  # gfn of the guest's root table if KVM shadows it, else -1; bytes into the page of a write ...
L1_PML_GFN, L1_PML_INDEX = 15, 16  # L1's own PML buffer while L2 runs with it, else -1; its index
PML_BARRED = 17  # L2 runs with PML off: a full buffer is an exit that must not happen
ASKED = 18  # AHEAD, ASKED: accesses up to which none is walked ahead, and whose faults' lines were asked for; kept over EXIT_SHADOW
REG_COLUMNS = 19
# Columns of Vcpu.guest: level and gfn that the walk came to, access allowed there; table and access on the way by level.
GW_LEVEL, GW_GFN, GW_ACCESS, GW_TABLE, GW_TABLE_ACCESS = 0, 1, 2, 3, 9
GW_COLUMNS = 14
# Columns of Vcpu.stat.
PF_TAKEN, PF_FIXED, PF_FAST, PF_EMULATE, PF_SPURIOUS, PF_MMIO_SPTE_CREATED = 0, 1, 2, 3, 4, 5
EXITS, PML_ENTRIES, PML_FULLS, RING_FULLS, SLOW_FAULTS, VIOLATIONS, MISCONFIGS = 6, 7, 8, 9, 10, 11, 12
STAT_COLUMNS = 13
WALKS_AHEAD = 16
# Exit reasons of a stay in the guest.
DONE, EXIT_RING_FULL, EXIT_MMIO, EXIT_HOST, EXIT_EFAULT, EXIT_NOMEM, EXIT_LOG = 0, 1, 2, 3, 4, 5, 6
EXIT_GUEST_FAULT, EXIT_GUEST_PML_FULL = 7, 8  # the guest's own tables do not allow the access; L1's PML buffer is full
EXIT_SHADOW, EMULATED, EXIT_ROOT = 9, 10, 11  # a fault for the shadow MMU; KVM did the access itself; the root was zapped
EXIT_INTERNAL = 12  # KVM gives up
# Events in Vcpu.log: kind and up to five values.
LOG_COLUMNS = 6
EV_FAULT, EV_FAST, EV_SET, EV_SPTE, EV_MARK, EV_PML, EV_PML_FULL, EV_PUSH, EV_RING_EXIT, EV_MMIO = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10


class Mode(NamedTuple):
    """Platform and policy as kernels see them: the layout of an entry and one number a decision."""

    lay: Layout
    max_level: np.int64
    ad: np.int64  # hardware sets A and D
    dirty_log_size: np.int64  # 512: PML hardware
    eager: np.int64
    nx: np.int64
    split_in_place: np.int64
    fast_fault: np.int64
    oldest_first: np.int64
    dirty_on_remake: np.int64
    fast_huge_fault: np.int64  # a huge leaf may be mended without mmu_lock
    prefetch_tail: np.int64  # prefetch fills the run that ends the group
    freed_table_flush: np.int64  # each table of the TDP MMU that is freed flushes
    l2_types: np.int64  # leaves of guest_mmu, where PML does not serve, are tagged as write-protected
    sync_remakes: np.int64  # a sync makes every leaf anew
    sync_accessed: np.int64  # with A
    dirty_on_sync: np.int64  # and, over one with W, with D
    aging_clears: np.uint64  # bits that aging takes beside A, in the TDP MMU
    prefault_leaves: np.int64  # prefault leaves a present leaf alone
    flush_each: np.int64
    recover: np.int64
    clear_arms_huge: np.int64  # initially-set: CLEAR finds huge leaves that may be writable
    shadow: np.int64  # direct roots belong to the shadow MMU (tdp_mmu=N)
    nx_marks: np.int64  # 0 none, 1 where a huge page would fit, 2 every table that an exec fault links
    nx_any_table: np.int64
    collapse_pages: np.int64
    collapse_precise: np.int64
    level_clamped: np.int64
    hw_ad: np.int64  # the running root's A and D bits are set by hardware
    disabled_ad: np.int64  # A and D bits are kept in entries of type disabled too
    tdp: np.int64  # the CPU has two-dimensional paging
    l2_root_wp: np.int64  # PML hardware: the root that L2 shares with L1's memory is write-protected
    gpte: GuestPaging  # the guest tables that KVM shadows


def zeros(count: int, dtype: Any = np.int64) -> npt.NDArray[Any]:
    """Return `count` zeros of `dtype`."""
    return np.zeros(count, dtype)
