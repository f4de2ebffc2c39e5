"""The MMU of one VM: its arena, the roots of the TDP MMU and of the shadow MMU, and work on what they map."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import numpy as np

from spte.arrays.mode import Modes
from spte.arrays.records import I64s
from spte.arrays.tables import PAE_ROOT, Tables
from spte.arrays.vcpu import Vcpu
from spte.bits import PFN_MASK, ROLE_AD_DISABLED, ROLE_DIRECT, ROLE_INVALID, ROLE_IS_DIRECT, ROLE_PAGING_OFF, ROLE_SMM_SHIFT, is_link
from spte.errors import NestedError, OutOfTablesError
from spte.host.pages import the_host
from spte.mmu.arena import alloc_row, free_row, new_tables
from spte.mmu.shadow.root import alloc_root, link_root, sync_root, unlink_root
from spte.mmu.slot.age import age_range
from spte.mmu.slot.rmap import age_rmaps, zap_all_shadow, zap_rmaps
from spte.mmu.slot.zap import zap_range, zap_range_tables, zap_root
from spte.observe.tracepoints import EventLog
from spte.platform import SHADOW, Platform
from spte.policy import Policy
from spte.vm.memslots import ADDRESS_SPACES, Memslot, Memslots
from spte.vm.root_cache import Root, VcpuMmu

REACH = 1 << 36  # gfns
NO_ROOTS = np.zeros(0, np.int64)
PAE_ENTRIES = 4  # each maps 1 GiB
_UNTRACED = contextlib.nullcontext()


class Mmu:
    """Page tables of a VM.

    Parameters
    ----------
    platform : Platform
        Says who owns direct roots, and gives their role.
    policy : Policy
        What the kernel version does; replaced when a module parameter is set.
    mode : Modes
        What kernels need to know.
    memslots : Memslots
        Whose rmaps the shadow MMU keeps.
    """

    def __init__(self, platform: Platform, policy: Policy, mode: Modes, memslots: Memslots) -> None:
        self.policy = policy
        self.tables: Tables = new_tables()
        self.mode = mode
        self.memslots = memslots
        self.log = EventLog()
        self.direct_role = ROLE_DIRECT | 4 | (0 if platform.ad_bits else ROLE_AD_DISABLED)
        self.first_role = ROLE_PAGING_OFF | 3 if platform.paging == SHADOW else self.direct_role
        self.shadow_root_allocated = False
        self.has_shadow_pages = bool(mode[0].shadow)  # the shadow MMU may map something
        self.generation = 0  # counts what a vCPU must take over before it enters the guest: a new mode, roots that are gone
        self.reloads = 0  # how often every vCPU was asked to let go of its roots: KVM_REQ_MMU_RELOAD
        self._tdp: dict[int, int] = {}  # role -> row of a valid root
        self._valid_roots = [NO_ROOTS] * ADDRESS_SPACES

    def set_mode(self, policy: Policy, mode: Modes) -> None:
        """Replace the policy and what kernels need to know; vCPUs take it over at their next entry."""
        self.policy, self.mode = policy, mode
        self.generation += 1

    # -- roots ------------------------------------------------------------------------------------------------------------

    def load(self, vcpu: VcpuMmu, v: Vcpu) -> None:
        """Before a guest entry let go of roots that were zapped, give the vCPU the root that it is to run on: kvm_mmu_reload."""
        if vcpu.is_pae:
            self._load_pae_root(vcpu, v)
            return
        if vcpu.reloads != self.reloads:
            self._drop_roots(vcpu)
        for cache in (vcpu.root_mmu, vcpu.guest_mmu):
            self.release(cache.drop({root.row for _, root in cache if self.is_invalid(root.row)}))
        cache = vcpu.active
        if cache.current is None:
            row = self._new_root(vcpu, v)
            if row < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            self.tables.pages[row].root_count += 1
            cache.current = Root(row, vcpu.role, 0 if vcpu.is_direct else vcpu.pgd)
            self.sync(vcpu, v)
        v.vcpu[0].root = cache.current.row
        v.vcpu[0].pgd = -1 if vcpu.is_direct else vcpu.pgd >> 12

    def _drop_roots(self, vcpu: VcpuMmu) -> None:
        """Let the vCPU let go of all its roots, valid ones too, and free those of the TDP MMU that nobody holds: kvm_mmu_unload."""
        vcpu.reloads = self.reloads
        self._release_all(vcpu)
        self._zap_unheld()

    def _release_all(self, vcpu: VcpuMmu) -> None:
        for cache in (vcpu.root_mmu, vcpu.guest_mmu):
            self.release(vcpu.drop(cache, {root.row for _, root in cache}))

    def _zap_unheld(self) -> None:
        unheld = [role for role, row in self._tdp.items() if not self.tables.pages[row].root_count]
        for role in unheld:
            zap_root(self.tables, self.mode, np.int64(self._tdp[role]), True)
        self._forget_roots(unheld)

    def reset_context(self, vcpu: VcpuMmu, role: int) -> None:
        """Let the vCPU let go of all its roots, and run on one with `role` from its next entry on: kvm_mmu_reset_context."""
        self.drop_pae_pages(vcpu)
        self._release_all(vcpu)
        if not self.policy.roots_kept:
            self._zap_unheld()
        vcpu.active, vcpu.role, vcpu.pgd = vcpu.root_mmu, role, 0

    def _new_root(self, vcpu: VcpuMmu, v: Vcpu) -> int:
        """Return the row, -1 if there is none: mmu_alloc_direct_roots, mmu_alloc_shadow_roots, kvm_tdp_mmu_alloc_root."""
        role = vcpu.role
        if not vcpu.is_direct:
            self.check_root(vcpu.pgd)
            self._first_shadow_root()
        if self.mode[0].shadow or not vcpu.is_direct:
            gfn = 0 if vcpu.is_direct else vcpu.pgd >> 12
            s = self.memslots.spaces[vcpu.as_id]
            return int(alloc_root(self.tables, s, the_host(), v, vcpu.mode, np.int64(gfn), np.int64(4), np.int64(role)))
        if role not in self._tdp:
            row = int(alloc_row(self.tables, np.int64(4), np.int64(0), np.uint64(role), self.mode[0].lay.nonpresent))
            if row >= 0:
                self._tdp[role] = row
                self._list_roots()
            return row
        return self._tdp[role]

    def _load_pae_root(self, vcpu: VcpuMmu, v: Vcpu) -> None:
        """mmu_alloc_direct_roots for a guest whose paging is off, under shadow paging: a PAE root over shared level-2 pages.

        It is no shadow page: it is in no hash and no listing. Pages that were zapped are made anew.
        """
        t, reg = self.tables, v.vcpu[0]
        self._first_shadow_root()
        if vcpu.pae_root < 0:
            vcpu.pae_root = int(alloc_row(t, np.int64(3), np.int64(0), np.uint64(vcpu.role), self.mode[0].lay.nonpresent))
            if vcpu.pae_root < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            t.pages[vcpu.pae_root].shadow = PAE_ROOT
        row = vcpu.pae_root
        t.pages[row].role = vcpu.role
        reg.root, reg.pgd = row, -1
        pages = self._pae_pages(row)
        if pages and not self.is_invalid(pages[0].row):
            return
        self.drop_pae_pages(vcpu)
        s, role = self.memslots.spaces[vcpu.as_id], np.int64(vcpu.role - 1)  # of level 2
        for i in range(PAE_ENTRIES):
            page = alloc_root(t, s, the_host(), v, self.mode, np.int64(i << 18), np.int64(2), role)
            if page < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            t.pages[page].root_count += 1
            link_root(t, s, self.mode, np.int64(row), np.int64(i), page)

    def _pae_pages(self, row: int) -> list[Root]:
        """Return the level-2 pages that a PAE root links to, which its vCPU holds."""
        entries = self.tables.sptes[row, :PAE_ENTRIES]
        return [Root(int(entry & PFN_MASK) >> 12, ROLE_PAGING_OFF | 2, 0) for entry in entries if is_link(entry)]

    def drop_pae_pages(self, vcpu: VcpuMmu) -> None:
        """Let go of the pages below the vCPU's PAE root, if it has one, and empty it."""
        row = vcpu.pae_root
        if row < 0:
            return
        pages = self._pae_pages(row)
        for i, page in enumerate(pages):
            if not self.is_invalid(page.row):  # else a zap has forgotten who links to it
                unlink_root(self.tables, self.memslots.spaces[vcpu.as_id], self.mode, np.int64(row), np.int64(i))
        self.tables.sptes[row, :PAE_ENTRIES] = self.mode[0].lay.nonpresent
        self.release(pages)

    def check_root(self, pgd: int) -> None:
        """Refuse the guest's root table at `pgd` (bytes; flags below 4096) with NestedError (EINVAL) if no memslot has it."""
        if self.memslots.at(pgd >> 12) is None:
            raise NestedError(f"root table {pgd & ~0xFFF:#x} of the guest is in no memslot; create one there first")

    def _list_roots(self) -> None:
        rows: list[list[int]] = [[] for _ in range(ADDRESS_SPACES)]
        for role, row in self._tdp.items():
            rows[role >> ROLE_SMM_SHIFT].insert(0, row)
        self._valid_roots = [np.array(each, np.int64) for each in rows]
        # Tables of the guest are shadowed in address space 0 alone: SMM runs with its paging off.
        self.tables.kvm[0].tdp_mmu_roots[: len(rows[0])] = rows[0]
        self.tables.kvm[0].nr_tdp_mmu_roots = len(rows[0])

    def _first_shadow_root(self) -> None:
        """Give every slot rmaps when the first root is loaded that needs them: mmu_first_shadow_root_alloc."""
        if not self.shadow_root_allocated:
            self.memslots.allocate_rmaps()
            self.shadow_root_allocated = self.has_shadow_pages = True

    def sync(self, vcpu: VcpuMmu, v: Vcpu) -> None:
        """Bring the pages below the root in step with the guest tables that they shadow: kvm_mmu_sync_roots."""
        root = vcpu.active.current
        if root is not None and not root.role & ROLE_IS_DIRECT:
            sync_root(self.tables, self.memslots.spaces[vcpu.as_id], the_host(), v, vcpu.mode, np.int64(root.row))

    def is_invalid(self, row: int) -> bool:
        """Tell whether a root was zapped: role.invalid."""
        return bool(int(self.tables.pages[row].role) & ROLE_INVALID)

    def release(self, roots: Iterable[Root]) -> None:
        """Let go of roots together; zapped ones that nobody else holds are freed, shadow pages with one flush: kvm_mmu_free_roots."""
        flush = False
        for root in roots:
            self.tables.pages[root.row].root_count -= 1
            if not self.tables.pages[root.row].root_count and self.is_invalid(root.row):
                flush |= bool(self.tables.pages[root.row].shadow)
                free_row(self.tables, np.int64(root.row))
        if flush:
            self.flush()

    def roots(self, as_id: int) -> I64s:
        """Return the rows of the TDP MMU's valid roots of an address space, newest first."""
        return self._valid_roots[as_id]

    def roots_of(self, slot: Memslot) -> I64s:
        """Return those under which `slot` can be mapped: none for a slot beyond what four levels of tables reach."""
        return self.roots(slot.as_id) if slot.base_gfn < REACH else NO_ROOTS

    # -- work on what is mapped -------------------------------------------------------------------------------------------

    def zap_all(self) -> None:
        """Drop every SPTE; vCPUs load new roots at their next entry, the flush of what the TDP MMU mapped: kvm_mmu_zap_all_fast.

        Pages of the shadow MMU go with a flush, if any was valid.
        """
        new_roots = self.policy.zap_all == "new-roots"
        with self.traced():
            freed = sum(int(zap_root(self.tables, self.mode, np.int64(row), new_roots)) for row in self._tdp.values())
        if freed and self.policy.freed_table_flush:
            self.tables.kvm[0].remote_tlb_flush_requests += freed + 1
        if new_roots:
            self._forget_roots(self._tdp)
        else:
            self.reloads += 1
        self.generation += 1
        if self.has_shadow_pages:
            valid = zap_all_shadow(self.tables, self.memslots.spaces[0], self.mode)
            self.memslots.clear_rmaps()
            if valid:
                self.flush()

    def _forget_roots(self, roles: Iterable[int]) -> None:
        """Take the TDP MMU's roots of `roles` from its list, and free those that no vCPU holds."""
        for role in list(roles):
            row = self._tdp.pop(role)
            if not self.tables.pages[row].root_count:
                free_row(self.tables, np.int64(row))
        self._list_roots()

    def zap_gfns(self, slot: Memslot, start: int, end: int) -> int:
        """Drop every SPTE of `slot` that maps gfns ``[start, end)``; returns how many, the caller flushes if not 0: kvm_unmap_gfn_range."""
        dropped = 0
        if self.memslots.has_rmaps(slot):
            s, k = self.memslots.row_of(slot)
            dropped += int(zap_rmaps(self.tables, s, self.mode, k, np.int64(start), np.int64(end)))
        zap = zap_range_tables if self.policy.unmap == "tables" else zap_range
        with self.traced():
            return dropped + int(zap(self.tables, self.mode, self.roots_of(slot), np.int64(start), np.int64(end)))

    def age_gfns(self, slot: Memslot, start: int, end: int, *, clear: bool) -> int:
        """Return how many leaves of `slot` in gfns ``[start, end)`` were accessed; `clear`: make their next use visible: kvm_age_gfn."""
        young = 0
        if self.memslots.has_rmaps(slot):
            s, k = self.memslots.row_of(slot)
            young += int(age_rmaps(self.tables, s, self.mode, k, np.int64(start), np.int64(end), clear))
        with self.traced():
            return young + int(age_range(self.tables, self.mode, self.roots_of(slot), np.int64(start), np.int64(end), clear))

    def flush(self) -> None:
        """Count one TLB flush request: kvm_flush_remote_tlbs."""
        self.tables.kvm["remote_tlb_flush_requests"][0] += 1

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which changes of entries are recorded, if tracing is on; the shadow MMU has no tracepoint for them."""
        return self.log.changes(self.tables) if self.log.tracing and not self.mode[0].shadow else _UNTRACED
