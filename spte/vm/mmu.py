"""The MMU of one VM: its arena, the roots of the TDP MMU and of the shadow MMU, and work on what they map."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spte.arrays.context import FLUSHES, PGD, ROOT, TDP_ROOTS, I64s, Mode
from spte.bits import ROLE_AD_DISABLED, ROLE_DIRECT, ROLE_INVALID, ROLE_IS_DIRECT
from spte.errors import NestedError, OutOfTablesError
from spte.host.pages import the_host
from spte.mmu.shadow.sync import get_page, sync_children
from spte.mmu.slot.age import age_range
from spte.mmu.slot.rmap import age_rmaps, zap_all_shadow, zap_rmaps
from spte.mmu.slot.zap import zap_range, zap_range_tables, zap_root
from spte.mmu.walk import alloc_row, free_row, new_tables
from spte.observe.tracepoints import EventLog
from spte.platform import Platform
from spte.policy import Policy
from spte.vm.memslots import Memslot, Memslots
from spte.vm.root_cache import Root

if TYPE_CHECKING:
    from spte.vm.nested import NestedVcpu

REACH = 1 << 36  # gfns
NO_ROOTS = np.zeros(0, np.int64)


class Mmu:
    """Page tables of a VM.

    Parameters
    ----------
    platform : Platform
        Says who owns direct roots, and gives their role.
    policy : Policy
        What the kernel version does; replaced when a module parameter is set.
    mode : Mode
        What kernels need to know; replaced when a policy or capability changes.
    memslots : Memslots
        Whose rmaps the shadow MMU keeps.
    """

    def __init__(self, platform: Platform, policy: Policy, mode: Mode, memslots: Memslots) -> None:
        self.policy = policy
        self.tables = new_tables()
        self.mode = mode
        self.memslots = memslots
        self.log = EventLog()
        self.vcpus: Sequence[NestedVcpu] = ()
        self.direct_role = ROLE_DIRECT | 4 | (0 if platform.ad_bits else ROLE_AD_DISABLED)
        self.shadow_root_allocated = False
        self._tdp: dict[int, int] = {}  # role -> row of a valid root

    @property
    def has_shadow_pages(self) -> bool:
        """The shadow MMU may map something."""
        return bool(self.mode.shadow) or self.shadow_root_allocated

    # -- roots ------------------------------------------------------------------------------------------------------------

    def load(self, vcpu: NestedVcpu) -> None:
        """Before a guest entry: let go of roots that were zapped, give `vcpu` the root that it is to run on."""
        if vcpu.reload_requested:
            self._drop_roots(vcpu)
        for cache in (vcpu.root_mmu, vcpu.guest_mmu):
            self.release(cache.drop({root.row for _, root in cache if self.is_invalid(root.row)}))
        reg, cache = vcpu.arrays.reg, vcpu.active
        if cache.current is None:
            row = self._new_root(vcpu)
            if row < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            self.tables.held[row] += 1
            cache.current = Root(row, vcpu.role, 0 if vcpu.role & ROLE_IS_DIRECT else vcpu.pgd)
            self.sync(vcpu)
        reg[ROOT] = cache.current.row
        reg[PGD] = -1 if vcpu.role & ROLE_IS_DIRECT else vcpu.pgd >> 12

    def _drop_roots(self, vcpu: NestedVcpu) -> None:
        """Let `vcpu` let go of all its roots, also of those that are valid, and free those of the TDP MMU that nobody holds."""
        vcpu.reload_requested = False
        for cache in (vcpu.root_mmu, vcpu.guest_mmu):
            self.release(cache.drop({root.row for _, root in cache}))
        unheld = [role for role, row in self._tdp.items() if not self.tables.held[row]]
        for role in unheld:
            zap_root(self.tables, self.mode, np.int64(self._tdp[role]), True)
        self._forget_roots(unheld)

    def _new_root(self, vcpu: NestedVcpu) -> int:
        role = vcpu.role
        if not role & ROLE_IS_DIRECT:
            self.check_root(vcpu.pgd)
            self._first_shadow_root()
        if self.mode.shadow or not role & ROLE_IS_DIRECT:
            gfn = 0 if role & ROLE_IS_DIRECT else vcpu.pgd >> 12
            s = self.memslots.spaces[0]
            return int(get_page(self.tables, s, the_host(), vcpu.arrays, vcpu.mode, np.int64(gfn), np.int64(4), np.int64(role)))
        if role not in self._tdp:
            row = int(alloc_row(self.tables, np.int64(4), np.int64(0), np.uint64(role), np.int64(-1), self.mode.lay.nonpresent))
            if row >= 0:
                self._tdp[role] = row
                self._list_roots()
            return row
        return self._tdp[role]

    def check_root(self, pgd: int) -> None:
        """Refuse the guest's root table at `pgd` (bytes; flags below 4096) with NestedError (EINVAL) if no memslot has it."""
        if self.memslots.at(pgd >> 12) is None:
            raise NestedError(f"root table {pgd & ~0xFFF:#x} of the guest is in no memslot; create one there first")

    def _list_roots(self) -> None:
        rows = list(self._tdp.values())[::-1]
        self.tables.roots[: len(rows)] = rows
        self.tables.meta[TDP_ROOTS] = len(rows)

    def _first_shadow_root(self) -> None:
        """Give every slot rmaps when the first root is loaded that needs them."""
        if not self.shadow_root_allocated:
            self.memslots.allocate_rmaps()
            self.shadow_root_allocated = True

    def sync(self, vcpu: NestedVcpu) -> None:
        """Bring the pages below the vCPU's root in step with the guest tables that they shadow, as a guest's TLB flush asks."""
        root = vcpu.active.current
        if root is not None and not root.role & ROLE_IS_DIRECT:
            sync_children(self.tables, self.memslots.spaces[0], the_host(), vcpu.arrays, vcpu.mode, np.int64(root.row))

    def is_invalid(self, row: int) -> bool:
        """Tell whether a root was zapped."""
        return bool(int(self.tables.role[row]) & ROLE_INVALID)

    def release(self, roots: Iterable[Root]) -> None:
        """Let go of roots together; zapped ones that nobody else holds are freed, those of the shadow MMU with one flush."""
        flush = False
        for root in roots:
            self.tables.held[root.row] -= 1
            if not self.tables.held[root.row] and self.is_invalid(root.row):
                flush |= bool(self.tables.shadow[root.row])
                free_row(self.tables, np.int64(root.row))
        if flush:
            self.flush()

    def roots(self, as_id: int) -> I64s:
        """Return the rows of the TDP MMU's valid roots of an address space, newest first."""
        return self.tables.roots[: int(self.tables.meta[TDP_ROOTS])] if as_id == 0 else NO_ROOTS

    def roots_of(self, slot: Memslot) -> I64s:
        """Return those under which `slot` can be mapped: none for a slot beyond what four levels of tables reach."""
        return self.roots(slot.as_id) if slot.base_gfn < REACH else NO_ROOTS

    # -- work on what is mapped -------------------------------------------------------------------------------------------

    def zap_all(self) -> None:
        """Drop every SPTE; vCPUs load new roots at their next entry, which acts as the flush of what the TDP MMU mapped.

        Pages of the shadow MMU go with a flush, if any was valid.
        """
        new_roots = self.policy.zap_all == "new-roots"
        with self.traced():
            freed = sum(int(zap_root(self.tables, self.mode, np.int64(row), new_roots)) for row in self._tdp.values())
        if freed and self.policy.freed_table_flush:
            self.tables.meta[FLUSHES] += freed + 1
        if new_roots:
            self._forget_roots(self._tdp)
        else:
            for vcpu in self.vcpus:
                vcpu.reload_requested = True
        if self.has_shadow_pages:
            valid = zap_all_shadow(self.tables, self.memslots.spaces[0], self.mode)
            self.memslots.clear_rmaps()
            if valid:
                self.flush()

    def _forget_roots(self, roles: Iterable[int]) -> None:
        """Take the TDP MMU's roots of `roles` from its list, and free those that no vCPU holds."""
        for role in list(roles):
            row = self._tdp.pop(role)
            if not self.tables.held[row]:
                free_row(self.tables, np.int64(row))
        self._list_roots()

    def zap_gfns(self, slot: Memslot, start: int, end: int) -> int:
        """Drop every SPTE of `slot` that maps gfns ``[start, end)``; returns SPTEs dropped, the caller flushes if not 0."""
        dropped = 0
        if self.memslots.has_rmaps(slot):
            s, k = self.memslots.place(slot)
            dropped += int(zap_rmaps(self.tables, s, self.mode, k, np.int64(start), np.int64(end)))
        zap = zap_range_tables if self.policy.unmap == "tables" else zap_range
        with self.traced():
            return dropped + int(zap(self.tables, self.mode, self.roots_of(slot), np.int64(start), np.int64(end)))

    def age_gfns(self, slot: Memslot, start: int, end: int, *, clear: bool) -> int:
        """Return how many leaves of `slot` in gfns ``[start, end)`` were accessed; `clear`: make their next use visible."""
        young = 0
        if self.memslots.has_rmaps(slot):
            s, k = self.memslots.place(slot)
            young += int(age_rmaps(self.tables, s, self.mode, k, np.int64(start), np.int64(end), clear))
        with self.traced():
            return young + int(age_range(self.tables, self.mode, self.roots_of(slot), np.int64(start), np.int64(end), clear))

    def flush(self) -> None:
        """Count one TLB flush request."""
        self.tables.meta[FLUSHES] += 1

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which changes of entries are recorded, if tracing is on; the shadow MMU has no tracepoint for them."""
        return contextlib.nullcontext() if self.mode.shadow else self.log.changes(self.tables)
