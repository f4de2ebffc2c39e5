"""What the oracle is made of: kinds of hardware, memslots, leaves, vCPUs. It knows nothing of `spte`."""

from dataclasses import dataclass, field
from typing import NamedTuple

from oracle.host import PAGES, Host

READ, WRITE, EXEC = 1, 2, 4
SPAN = PAGES[4] * 512  # addresses of one view: address % SPAN is the gfn, address // SPAN the alias by which a vCPU reaches it
LOG, RO = 1, 2
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


def kind_of(platform):
    """The hardware of a platform by name, whichever MMU it has."""
    return KINDS["npt" if platform == "shadow" else platform.removesuffix("-rmap")]


@dataclass
class Slot:
    id: int  # as_id << 16 | number
    base: int
    npages: int
    host: Host
    off: int
    flags: int
    dirty: set | None = None
    began_set: bool = False  # logging began with every page dirty and nothing armed
    unarmed: bool = False  # ... and the mode that would arm it at CLEAR was left, or there is no bitmap: KVM may lose writes

    @property
    def as_id(self):
        return self.id >> 16

    @property
    def end(self):
        return self.base + self.npages

    @property
    def gfns(self):
        return range(self.base, self.end)

    def hpage(self, gfn):
        return gfn % SPAN - self.base + self.off

    def gfns_of(self, first, count):
        """Gfns that map host pages `first` and on."""
        start, end = max(first, self.off), min(first + count, self.off + self.npages)
        return range(start - self.off + self.base, max(start, end) - self.off + self.base)

    def disallow(self, gfn, level):
        size, gfn = PAGES[level], gfn % SPAN
        hva_fits = (self.base - self.host.first - self.off) % size == 0
        head = self.base % size != 0 and gfn // size == self.base // size
        tail = self.end % size != 0 and gfn // size == (self.end - 1) // size
        return not hva_fits or head or tail

    def allowed_level(self, gfn):
        return next((level for level in (3, 2) if not self.disallow(gfn, level)), 1)

    def host_level(self, gfn):
        return self.host.level(self.hpage(gfn))

    def max_level(self, gfn):
        return min(self.allowed_level(gfn), self.host_level(gfn))


@dataclass
class Leaf:
    hw: bool
    mw: bool
    w: bool
    d: bool
    a: bool = True
    x: bool = True
    parked: bool = False  # access tracking: R and X parked
    zero: bool = False  # maps the host's zero page
    by_w: bool = False  # of L2 on hardware with PML: W is what dirty logging clears


class Cached(NamedTuple):
    """A translation in a TLB, as it was when a walk filled it."""

    w: bool
    d: bool
    level: int
    frame: object
    aged: bool = False  # its leaf was parked since, without a flush


@dataclass
class Vcpu:
    pml: list = field(default_factory=list)
    ring: list = field(default_factory=list)  # [slot, offset, harvested], oldest first
    tlb: dict = field(default_factory=dict)  # address -> Cached
    root: int | None = None  # which of the roots made so far it holds
    stats: dict = field(default_factory=lambda: dict.fromkeys(STATS, 0))
