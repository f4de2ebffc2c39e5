"""A guest that runs guests: one slot of data and one of L1's tables for L2, or of a 64-bit guest's own; what is written of it."""

import numpy as np
from conftest import LOG, PAGE, Guest

import spte
from spte.bits import PFN_MASK, SHIFT_PAGE
from spte.guest_tables import GuestTables
from spte.host.pages import ZERO_PFN
from spte.mmu.walk import walk

TABLES_GFN, TABLES_PAGES = 1 << 18, 64
L2 = 1 << 16  # where L2 sees page 0 of the data


def kind_of(platform):
    """What L1 or the guest pages with on `platform`."""
    return "long" if platform == "shadow" else platform[:3]


def violation_of(platform):
    return {"ept": "ept_violation", "npt": "npf", "long": "page_fault"}[kind_of(platform)]


def host_page(vm, gfn, v=0):
    """The host page that the vCPU's root maps an address to, None for the zero page, and the level of its leaf."""
    t = vm.mmu.tables
    row, i, level = walk(t, vm.vcpus[v].arrays.vcpu[0].root, np.int64(gfn))
    frame = t.sptes[row, i] & PFN_MASK
    if frame == ZERO_PFN << SHIFT_PAGE:
        return None, int(level)
    return (int(frame) >> 12) + gfn % (1 << 9 * (level - 1)), int(level)


class Nest(Guest):
    """As `Guest`, with tables that show page p of its slot at ``L2 + p`` and at `views` - 1 addresses more, 2 MiB apart at least."""

    def __init__(self, platform, policy="6.12", *, ad=True, level=1, views=1, **more):
        super().__init__(platform, policy, **more)
        self.ad, self.platform, self.span = ad, platform, -(-self.npages // 512) * 512
        self.table_memory = spte.Backing("4k", TABLES_PAGES * PAGE, populate=True)
        self.vm.set_memory_region(1, TABLES_GFN * PAGE, TABLES_PAGES * PAGE, self.table_memory)
        self.tables = GuestTables(self.table_memory, TABLES_GFN * PAGE, kind_of(platform))
        size = 1 << 9 * (level - 1)
        for view in range(views):
            self.tables.map(L2 + view * self.span, self.base, self.npages // size, level=level)
        self.tables.map(TABLES_GFN, TABLES_GFN, TABLES_PAGES)

    def enter(self, v=0):
        """Let vCPU `v` run on the tables: as L2, or with its paging on."""
        if self.platform == "shadow":
            self.vm.vcpus[v].load_cr3(self.tables.address())
        else:
            self.vm.vcpus[v].enter_l2(self.tables.address(), ad=self.ad)

    def leave(self, v=0):
        if self.platform == "shadow":
            self.vm.vcpus[v].load_cr3(None)
        else:
            self.vm.vcpus[v].leave_l2()

    def at(self, pages, view=0):
        """Page numbers that the nested guest gives for `pages` of the data."""
        return np.asarray(list(pages), np.int64) + L2 + view * self.span

    def write_as_l2(self, pages, v=0, view=0):
        self._run(self.vm.vcpus[v].write, self.at(pages, view) - self.base, v)

    def read_as_l2(self, pages, v=0, view=0):
        self._run(self.vm.vcpus[v].read, self.at(pages, view) - self.base, v)

    def entry(self, page, view=0):
        """Address, value and level of the guest-table entry of a page of the data."""
        return self.tables.entry(L2 + page + view * self.span)

    def reaches(self, gfn, v=0):
        """The page of the data that an address of the running guest is mapped to, None for the host's zero page; and the level."""
        page, level = host_page(self.vm, gfn, v)
        return page if page is None else page - self.memory.hpage, level

    def faults(self, v=0):
        return self.stats("pf_taken", f"vcpu{v}")

    def log_tables(self, on=True):
        self.vm.set_memory_region(1, TABLES_GFN * PAGE, TABLES_PAGES * PAGE, flags=LOG * on)
