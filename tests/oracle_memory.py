"""What the oracle is made of: kinds of hardware, host pages, memslots, leaves, vCPUs. It knows nothing of `spte`."""

from dataclasses import dataclass, field
from typing import ClassVar

READ, WRITE, EXEC = 0, 1, 2
LOG, RO = 1, 2
PAGES = {1: 1, 2: 512, 3: 512**2, 4: 512**3}
STATS = ("pf_taken", "pf_fixed", "pf_fast", "pf_emulate", "pf_spurious", "pf_mmio_spte_created")


@dataclass(frozen=True)
class Kind:
    ept: bool
    ad: bool = True
    pml: bool = False


KINDS = {
    "ept-pml": Kind(ept=True, pml=True),
    "ept-nopml": Kind(ept=True),
    "ept-noad": Kind(ept=True, ad=False),
    "npt": Kind(ept=False),
    "npt-pml": Kind(ept=False, pml=True),
}


def align(gfn, level):
    return gfn - gfn % PAGES[level]


class Host:
    """The host pages of one backing, page numbers from 0; its first page is aligned to its largest mapping."""

    HUGE: ClassVar = {"thp": 2, "hugetlb2m": 2, "devdax2m": 2, "hugetlb1g": 3, "devdax1g": 3}
    serial = 0

    def __init__(self, kind, npages, populate=False):
        Host.serial += 1
        self.kind, self.npages, self.first = kind, npages, Host.serial * PAGES[4]
        self.pages, self.blocks, self.huge = {}, set(), self.HUGE.get(kind, 1)
        for page in range(npages if populate else 0):
            self.touch(page, write=True)

    def block(self, page):
        start = align(page, self.huge)
        return start if self.huge > 1 and start + PAGES[self.huge] <= self.npages else None

    def level(self, page):
        return self.huge if self.block(page) in self.blocks else 1

    def touch(self, page, write):
        """Fault a page in; returns (the PTE is writable, the zero page was replaced by a new one)."""
        if (start := self.block(page)) is not None:
            self.blocks.add(start)
            return True, False
        before = self.pages.get(page)
        self.pages[page] = "own" if write or self.kind == "shm" else before or "zero"
        return self.pages[page] == "own", before == "zero" and write


@dataclass
class Slot:
    id: int
    base: int
    npages: int
    host: Host
    off: int
    flags: int
    dirty: set | None = None

    @property
    def end(self):
        return self.base + self.npages

    def hpage(self, gfn):
        return gfn - self.base + self.off

    def disallow(self, gfn, level):
        size = PAGES[level]
        hva_fits = (self.base - self.host.first - self.off) % size == 0
        head = self.base % size != 0 and gfn // size == self.base // size
        tail = self.end % size != 0 and gfn // size == (self.end - 1) // size
        return not hva_fits or head or tail

    def max_level(self, gfn):
        allowed = next((level for level in (3, 2) if not self.disallow(gfn, level)), 1)
        return min(allowed, self.host.level(self.hpage(gfn)))


@dataclass
class Leaf:
    hw: bool
    mw: bool
    w: bool
    d: bool


@dataclass
class Vcpu:
    pml: list = field(default_factory=list)
    ring: list = field(default_factory=list)  # [slot, offset, harvested], oldest first
    tlb: dict = field(default_factory=dict)  # gfn -> (W, D) as cached
    stats: dict = field(default_factory=lambda: dict.fromkeys(STATS, 0))
