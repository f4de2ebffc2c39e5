"""The TDP MMU of one VM: its arena, the valid root, the root that each vCPU holds, and what can be seen of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spte import listing
from spte.bits import ROLE_AD_DISABLED, ROLE_DIRECT, ROLE_INVALID, SOFT_ACCESSED, SOFT_DIRTY, layout
from spte.context import FLUSHES, ROOT, I64s, Mode
from spte.errors import OutOfTablesError
from spte.events import EventLog
from spte.kernels.age import age_range
from spte.kernels.zap import zap_range, zap_root
from spte.memslot import Memslot
from spte.platform import SHADOW, Platform
from spte.policy import COLLAPSE_PAGES, Policy
from spte.tables import alloc_row, free_row, new_tables

if TYPE_CHECKING:
    from spte.vcpu import VirtualCpu

NO_ROOTS = np.zeros(0, np.int64)


def mode_of(platform: Platform, policy: Policy, manual: int) -> Mode:
    """Return what kernels need to know of platform, policy and manual protect."""
    i = np.int64
    lay = layout(platform, policy.era)
    nx_marks = 2 if policy.nx_marks == "linked" else 0 if platform.paging == SHADOW else 1
    if policy.software_ad and not platform.ad_bits:
        lay = lay._replace(accessed=SOFT_ACCESSED, dirty=SOFT_DIRTY)
    return Mode(
        lay=lay, max_level=i(platform.max_level), ad=i(platform.ad_bits),
        dirty_log_size=i(platform.cpu_dirty_log_size), eager=i(policy.eager_page_split and platform.tdp_mmu), nx=i(policy.nx_huge_pages),
        split_in_place=i(policy.fault_split == "in-place"), fast_fault=i(policy.fast_page_fault),
        oldest_first=i(policy.pml_order == "oldest-first"), dirty_on_remake=i(policy.dirty_on_remake),
        flush_each=i(policy.collapse_flush == "each"), recover=i(policy.collapse == "recover"),
        clear_arms_huge=i(manual == 3 and policy.initially_set_enable == "nothing"), shadow=i(not platform.tdp_mmu),
        nx_marks=i(nx_marks), nx_any_table=i(policy.nx_any_table),
        collapse_pages=i(COLLAPSE_PAGES.index(policy.collapse_pages)), collapse_precise=i(policy.collapse_precise),
        level_clamped=i(policy.mapping_level_clamped),
    )  # fmt: skip


class TdpMmu:
    """Page tables of a VM.

    Parameters
    ----------
    platform : Platform
        Gives the role of the root.
    mode : Mode
        What kernels need to know; replaced when a policy or capability changes.
    """

    def __init__(self, platform: Platform, mode: Mode) -> None:
        self.tables = new_tables()
        self.mode = mode
        self.log = EventLog()
        self.vcpus: Sequence[VirtualCpu] = ()
        self._role = ROLE_DIRECT | 4 | (0 if platform.ad_bits else ROLE_AD_DISABLED)
        self._root = -1
        self._roots = NO_ROOTS

    def load(self, vcpu: VirtualCpu) -> None:
        """Before a guest entry: make `vcpu` use the valid root, which is made if there is none."""
        if self._root < 0:
            root = self._new_root()
            if root < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            self._root, self._roots = root, np.array([root], np.int64)
        reg = vcpu.arrays.reg
        held, reg[ROOT] = int(reg[ROOT]), self._root
        if held != self._root:
            self._put(held)

    def _new_root(self) -> int:
        return int(alloc_row(self.tables, np.int64(4), np.int64(0), np.uint64(self._role), np.int64(-1), self.mode.lay.nonpresent))

    def _put(self, root: int) -> None:
        """Free `root`, which is not the valid one, once no vCPU holds it."""
        if root >= 0 and not any(vcpu.arrays.reg[ROOT] == root for vcpu in self.vcpus):
            free_row(self.tables, np.int64(root))

    def roots(self, as_id: int) -> I64s:
        """Return the rows of the valid roots of an address space."""
        return self._roots if as_id == 0 else NO_ROOTS

    def zap_all(self) -> None:
        """Drop every SPTE; vCPUs load a new root at their next entry, which acts as the flush."""
        if self._root >= 0:
            with self.traced():
                zap_root(self.tables, self.mode, np.int64(self._root))
            held, self._root, self._roots = self._root, -1, NO_ROOTS
            self._put(held)

    def zap_gfns(self, slot: Memslot, start: int, end: int) -> int:
        """Drop every leaf of `slot` that maps gfns ``[start, end)``; returns leaves dropped, the caller flushes if not 0."""
        with self.traced():
            return int(zap_range(self.tables, self.mode, self.roots(slot.as_id), np.int64(start), np.int64(end)))

    def age_gfns(self, slot: Memslot, start: int, end: int, *, clear: bool) -> int:
        """Return how many leaves of `slot` in gfns ``[start, end)`` were accessed; `clear`: make their next use visible."""
        with self.traced():
            return int(age_range(self.tables, self.mode, self.roots(slot.as_id), np.int64(start), np.int64(end), clear))

    def flush(self) -> None:
        """Count one TLB flush request."""
        self.tables.meta[FLUSHES] += 1

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which changes of entries are recorded, if tracing is on."""
        return self.log.changes(self.tables)

    def _root_of(self, vcpu: int) -> int:
        return int(self.vcpus[vcpu].arrays.reg[ROOT])

    def leafs(self, vcpu: int, hide: tuple[int, int] | None) -> list[list[Any]]:
        """Return the runs of leaves of a vCPU's root."""
        return listing.leafs(self.tables, root, hide) if (root := self._root_of(vcpu)) >= 0 else []

    def table_runs(self, vcpu: int, hide: tuple[int, int] | None) -> list[list[Any]]:
        """Return the runs of page-table pages of a vCPU's root."""
        return listing.tables(self.tables, root, hide) if (root := self._root_of(vcpu)) >= 0 else []

    def other(self, vcpu: int, hide: tuple[int, int] | None) -> list[list[Any]]:
        """Return the entries of a vCPU's root that are neither present nor empty."""
        return listing.other(self.tables, root, self.mode.lay, hide) if (root := self._root_of(vcpu)) >= 0 else []

    def root_invalid(self, vcpu: int) -> bool:
        """Tell whether a vCPU still holds a root that was zapped."""
        root = self._root_of(vcpu)
        return root >= 0 and bool(int(self.tables.role[root]) & ROLE_INVALID)

    def shares_root(self, vcpu: int, other: int) -> bool:
        """Tell whether two vCPUs hold the same root."""
        return self._root_of(vcpu) == self._root_of(other) >= 0
