"""Shadow paging for a guest whose own paging is off: a PAE root of four entries a vCPU, over shared level-2 pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from spte.bits import ROLE_INVALID, ROLE_PAGING_OFF
from spte.context import PAE_ROOT, ROOT, I64s
from spte.entries import link
from spte.errors import OutOfTablesError
from spte.shadow_fault import get_page
from spte.shadow_mmu import ShadowMmu
from spte.tables import alloc_row, child_of, free_row, is_link

if TYPE_CHECKING:
    from spte.vcpu import VirtualCpu

PAE_ENTRIES = 4  # each maps 1 GiB


class ShadowPaging(ShadowMmu):
    """Page tables of a VM without EPT or NPT. The PAE root of a vCPU is no shadow page: it is in no hash and no listing."""

    def load(self, vcpu: VirtualCpu) -> None:
        """Before a guest entry: make the PAE root of `vcpu` point to valid pages; obsolete ones go with a flush when the last lets go."""
        reg, t = vcpu.arrays.reg, self.tables
        if reg[ROOT] < 0:
            row = int(alloc_row(t, np.int64(3), np.int64(0), np.uint64(ROLE_PAGING_OFF | 3), np.int64(-1), self.mode.lay.nonpresent))
            if row < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            t.shadow[row] = PAE_ROOT
            reg[ROOT] = row
        root = int(reg[ROOT])
        held = self._pages_of(root)
        if held and not int(t.role[held[0]]) & ROLE_INVALID:
            return
        t.sptes[root, :PAE_ENTRIES] = self.mode.lay.nonpresent
        self._put_all(held)
        for i in range(PAE_ENTRIES):
            page = get_page(t, self.mode, np.int64(i << 18), np.int64(2), np.int64(ROLE_PAGING_OFF | 2))
            if page < 0:
                raise OutOfTablesError("no page-table page left for a root; delete slots or close the VM")
            link(t, self.mode, np.int64(root), np.int64(i), page)

    def _pages_of(self, root: int) -> list[int]:
        entries = self.tables.sptes[root, :PAE_ENTRIES]
        return [int(child_of(entry)) for entry in entries if is_link(entry)]

    def _held(self) -> I64s:
        roots = [int(vcpu.arrays.reg[ROOT]) for vcpu in self.vcpus]
        return np.unique(np.array([page for root in roots if root >= 0 for page in self._pages_of(root)], np.int64))

    def _put_all(self, pages: Iterable[int]) -> None:
        still = set(self._held().tolist())
        gone = [page for page in pages if page not in still]
        for page in gone:
            free_row(self.tables, np.int64(page))
        if gone:
            self.flush()
