"""Shadow paging for a guest whose own paging is off: a PAE root of four entries a vCPU, over shared level-2 pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spte.arrays.context import PAE_ROOT, PGD, ROOT
from spte.bits import PFN_MASK, ROLE_PAGING_OFF, is_link
from spte.errors import OutOfTablesError
from spte.host.pages import the_host
from spte.mmu.arena import alloc_row
from spte.mmu.shadow.page import link_page, unlink_page
from spte.mmu.shadow.sync import get_page
from spte.vm.mmu import Mmu
from spte.vm.root_cache import Root

if TYPE_CHECKING:
    from spte.vm.nested import NestedVcpu

PAE_ENTRIES = 4  # each maps 1 GiB


class ShadowPaging(Mmu):
    """Page tables of a VM without EPT or NPT. The PAE root of a vCPU is no shadow page: it is in no hash and no listing."""

    def load(self, vcpu: NestedVcpu) -> None:
        """As `Mmu.load`; with paging off, make the PAE root of `vcpu` point to valid pages."""
        if vcpu.role & ~0xF != ROLE_PAGING_OFF:
            super().load(vcpu)
            return
        reg, t = vcpu.arrays.reg, self.tables
        self._first_shadow_root()
        if vcpu.pae_root < 0:
            role = np.uint64(ROLE_PAGING_OFF | 3)
            vcpu.pae_root = int(alloc_row(t, np.int64(3), np.int64(0), role, np.int64(-1), self.mode.lay.nonpresent))
            if vcpu.pae_root < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            t.shadow[vcpu.pae_root] = PAE_ROOT
        row = vcpu.pae_root
        reg[ROOT], reg[PGD] = row, -1
        pages = self.pages_of(row)
        if pages and not self.is_invalid(pages[0].row):
            return
        self.drop_pages(row)
        s = self.memslots.spaces[0]
        for i in range(PAE_ENTRIES):
            page = get_page(t, s, the_host(), vcpu.arrays, self.mode, np.int64(i << 18), np.int64(2), np.int64(ROLE_PAGING_OFF | 2))
            if page < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            t.held[page] += 1
            link_page(t, s, self.mode, np.int64(row), np.int64(i), page)

    def pages_of(self, row: int) -> list[Root]:
        """Return the level-2 pages that a PAE root links to, which its vCPU holds."""
        entries = self.tables.sptes[row, :PAE_ENTRIES]
        return [Root(int(entry & PFN_MASK) >> 12, ROLE_PAGING_OFF | 2, 0) for entry in entries if is_link(entry)]

    def drop_pages(self, row: int) -> None:
        """Let go of them, and empty the root."""
        pages = self.pages_of(row)
        for i, page in enumerate(pages):
            if not self.is_invalid(page.row):  # else a zap has forgotten who links to it
                unlink_page(self.tables, self.memslots.spaces[0], self.mode, np.int64(row), np.int64(i))
        self.tables.sptes[row, :PAE_ENTRIES] = self.mode.lay.nonpresent
        self.release(pages)
