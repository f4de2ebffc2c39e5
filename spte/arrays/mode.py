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
    l2_root_wp: int  # PML hardware: the root that L2 shares with L1's memory is write-protected


MODE = record("mode", [
    ("lay", record("layout", columns("u8", *Layout._fields))), ("gpte", record("guest_paging", columns("u8", *GuestPaging._fields))),
    *columns("i8", *Mode._fields[2:]),
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
    lay = layout(platform, policy.era)
    nx_marks = 2 if policy.nx_marks == "linked" else 0 if platform.paging == SHADOW else 1
    if policy.software_ad and not platform.ad_bits:
        lay = lay._replace(accessed=SOFT_ACCESSED, dirty=SOFT_DIRTY)
    return pack(Mode(
        lay=lay, max_level=platform.max_level, ad=platform.ad_bits,
        dirty_log_size=platform.cpu_dirty_log_size, eager=policy.eager_page_split and platform.tdp_mmu, nx=policy.nx_huge_pages,
        split_in_place=policy.fault_split == "in-place", fast_fault=policy.fast_page_fault,
        oldest_first=policy.pml_order == "oldest-first", dirty_on_remake=policy.dirty_on_remake,
        flush_each=policy.collapse_flush == "each", recover=policy.collapse == "recover",
        clear_arms_huge=manual == 3 and policy.initially_set_enable == "nothing", shadow=not platform.tdp_mmu,
        nx_marks=nx_marks, nx_any_table=policy.nx_any_table,
        collapse_pages=COLLAPSE_PAGES.index(policy.collapse_pages), collapse_precise=policy.collapse_precise,
        level_clamped=policy.mapping_level_clamped, hw_ad=platform.ad_bits, disabled_ad=policy.software_ad,
        tdp=platform.paging != SHADOW, l2_root_wp=policy.l2_root_write_protect, gpte=GUEST_LONG,
    ))  # fmt: skip
