"""What kernels need to know of platform, policy, manual protect, and of the root that a vCPU runs on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from spte._numba.jit import PLAIN
from spte.arrays.records import Records, columns, record
from spte.bits import GUEST_LONG, SOFT_ACCESSED, SOFT_DIRTY, GuestPaging, Layout, layout
from spte.platform import SHADOW, Platform
from spte.policy import COLLAPSE_PAGES, Policy


class Mode(NamedTuple):
    """Platform and policy as kernels see them: the layout of an entry and one number a decision."""

    lay: Layout
    gpte: GuestPaging  # the guest tables that KVM shadows
    aging_clears: np.uint64  # bits that aging takes beside A, in the TDP MMU
    max_level: int
    ad: int  # hardware sets A and D
    dirty_log_size: int  # 512: PML hardware
    eager: int
    nx: int
    split_in_place: int
    fast_fault: int
    oldest_first: int
    dirty_on_remake: int
    flush_each: int
    recover: int
    clear_arms_huge: int  # initially-set: CLEAR finds huge leaves that may be writable
    shadow: int  # direct roots belong to the shadow MMU (tdp_mmu=N)
    nx_marks: int  # 0 none, 1 where a huge page would fit, 2 every table that an exec fault links
    nx_any_table: int
    collapse_pages: int
    collapse_precise: int
    level_clamped: int
    hw_ad: int  # the running root's A and D bits are set by hardware
    disabled_ad: int  # A and D bits are kept in entries of type disabled too
    tdp: int  # the CPU has two-dimensional paging
    fast_huge_fault: int  # a huge leaf may be mended without mmu_lock
    prefetch_tail: int  # prefetch fills the run that ends the group
    freed_table_flush: int  # each table of the TDP MMU that is freed flushes
    l2_types: int  # leaves of guest_mmu, where PML does not serve, are tagged as write-protected
    sync_remakes: int  # a sync makes every leaf anew
    sync_accessed: int  # with A
    dirty_on_sync: int  # and, over one with W, with D
    prefault_leaves: int  # prefault leaves a present leaf alone
    l2_root_wp: int  # PML hardware: the root that L2 shares with L1's memory is write-protected


MODE = record("mode", [
    ("lay", record("layout", columns("u8", *Layout._fields))), ("gpte", record("guest_paging", columns("u8", *GuestPaging._fields))),
    ("aging_clears", "u8"), *columns("i8", *Mode._fields[3:]),
])  # fmt: skip
Modes = Records | tuple[Mode]  # one mode: a record for compiled kernels; for their twins, to which a record is slow, the tuple itself


def pack(mode: Mode) -> Modes:
    """Return `mode` as kernels take it."""
    return (mode,) if PLAIN else np.array([tuple(mode)], MODE)


def replace(mode: Modes, **fields: Any) -> Modes:
    """Return a mode that differs from `mode` in `fields`."""
    return pack(Mode(*mode[0])._replace(**fields))


def mode_of(platform: Platform, policy: Policy, manual: int) -> Modes:
    """Return the mode of a VM whose vCPUs run L1."""
    lay = layout(platform, policy.spte_layout)
    nx_marks = 2 if policy.nx_marks == "linked" else 0 if platform.paging == SHADOW else 1
    if policy.software_ad and not platform.ad_bits:
        lay = lay._replace(accessed=SOFT_ACCESSED, dirty=SOFT_DIRTY)
    return pack(Mode(
        lay=lay, max_level=platform.max_level, ad=platform.ad_bits,
        dirty_log_size=platform.cpu_dirty_log_size, eager=policy.eager_page_split and platform.tdp_mmu, nx=policy.nx_huge_pages,
        split_in_place=policy.fault_split == "in-place", fast_fault=policy.fast_page_fault,
        oldest_first=policy.pml_order == "oldest-first", dirty_on_remake=policy.dirty_on_remake != "never",
        flush_each=policy.collapse_flush == "each", recover=policy.collapse == "recover",
        clear_arms_huge=manual == 3 and policy.initially_set_enable == "nothing", shadow=not platform.tdp_mmu,
        nx_marks=nx_marks, nx_any_table=policy.nx_any_table,
        collapse_pages=COLLAPSE_PAGES.index(policy.collapse_pages), collapse_precise=policy.collapse_precise,
        level_clamped=policy.mapping_level_clamped, hw_ad=platform.ad_bits, disabled_ad=policy.software_ad,
        fast_huge_fault=policy.fast_huge_fault,
        prefetch_tail=policy.prefetch_tail,
        freed_table_flush=policy.freed_table_flush,
        l2_types=platform.pml or policy.l2_type_without_pml,
        sync_remakes=policy.sync_remakes,
        sync_accessed=policy.sync_keeps_accessed,
        dirty_on_sync=policy.dirty_on_remake == "always",
        aging_clears=lay.dirty if policy.aging_clears_dirty else np.uint64(0),
        prefault_leaves=policy.prefault_present == "leaves",
        tdp=platform.paging != SHADOW, l2_root_wp=policy.l2_root_write_protect, gpte=GUEST_LONG,
    ))  # fmt: skip
