"""Costs: nanoseconds per item, each with where the number is from and how far it may be off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spte._arguments import spell

LONGEST_NS = 10**9
"""No item takes longer than a second."""


class CostError(ValueError):
    """A cost profile that can not be used; the message is one line with the value and the way out."""


def check_time(name: str, value: object) -> None:
    """Raise CostError unless `value` can be the time of one item, ns."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_NS:
        raise CostError(f"{name}={spell(value)} is no time of one item; take nanoseconds, 0 to {LONGEST_NS} (1 s)")


def _item(doc: str) -> Any:
    return dataclasses.field(metadata={"doc": doc})


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Nanoseconds per item; what each item is stands in the field's metadata, and `items` lists it.

    A fault costs `exit` and its own item, and likewise every other exit. mmu_lock is one server for those that hold it exclusively:
    `slow_fault_exclusive` is also how long such a fault holds it. Shared holders do not exclude each other; each other vCPU that
    faults at the same time adds `shared_contention`.
    """

    exit: float = _item("a VM exit and the entry after it, without what KVM does in between")
    fast_fault: float = _item("fast_page_fault mends a leaf without mmu_lock and marks the page")
    slow_fault_shared: float = _item("a fault under mmu_lock held shared (TDP MMU)")
    shared_contention: float = _item("what each other vCPU that faults at the same time adds to a fault under shared mmu_lock")
    slow_fault_exclusive: float = _item("a fault under mmu_lock held exclusively (rmap and shadow MMU)")
    split: float = _item("a huge leaf replaced by a table of 512 entries, its allocation included")
    pml_log: float = _item("a page that the CPU logs and KVM drains: D set, buffer written, page marked")
    pml_full_exit: float = _item("handling of an exit because of a full PML buffer, without its 512 entries")
    bitmap_word: float = _item("a word of 64 pages of the dirty bitmap that enabling allocates and clears")
    get_word: float = _item("a word of 64 pages that GET or CLEAR looks at and copies")
    mask_walk: float = _item("a mask of up to 64 pages that GET, CLEAR or RESET arms: the walk down to their table")
    clear_page: float = _item("an SPTE that enabling, GET, CLEAR or RESET arms again: W or D taken")
    flush_request: float = _item("a remote TLB flush, for each vCPU of the VM: the request is set")
    flush_vcpu: float = _item("a remote TLB flush or a kick, for each vCPU that runs: the interrupt, and waiting for it")
    ring_push: float = _item("an entry pushed to a dirty ring")
    ring_full_exit: float = _item("a full dirty ring: exit to userspace and back, without harvest")
    ring_collect: float = _item("an entry that userspace takes from a dirty ring and RESET passes over")
    collapse_2m: float = _item("a table of 512 entries replaced by a huge leaf, or dropped, when logging ends, without its leaves")
    zap: float = _item("a leaf dropped, alone or with its table")
    walk_2d: float = _item("an access to a page mapped at 4 KiB: the TLB miss and its second-level walk")

    def __post_init__(self) -> None:
        for name in ITEMS:
            check_time(name, getattr(self, name))

    @classmethod
    def only(cls, **costs: float) -> Costs:
        """Return these costs, ns, and all others 0."""
        return cls(**{**dict.fromkeys(ITEMS, 0.0), **costs})


ITEMS: dict[str, str] = {f.name: f.metadata["doc"] for f in dataclasses.fields(Costs)}
"""Every item of `Costs`, and what it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where one cost is from.

    Parameters
    ----------
    source : str
        Message id, commit, paper or command that the number is from; of a guess, what it leans on.
    date : str
        When it was measured or published; empty for a guess.
    machine : str
        What it was measured on; empty for a guess.
    guess : bool
        Nobody measured it: the number is the best that is known here.
    """

    source: str
    date: str = ""
    machine: str = ""
    guess: bool = False

    def __str__(self) -> str:
        return f"guess: {self.source}" if self.guess else f"{self.source}, {self.date}, {self.machine}"


@dataclasses.dataclass(frozen=True, slots=True)
class CostProfile:
    """The costs of one machine, with a band around each.

    Parameters
    ----------
    name : str
        As `spte.cost.load` takes it: a name that ships, or a path.
    title : str
        One line: which machine, and by what.
    costs, low, high : Costs
        Best value of each item, and the band that it lies in, ns.
    origins : mapping of str to Origin
        Where each item is from.

    Raises
    ------
    CostError
        If a value lies outside its band, or an item has no origin.
    """

    name: str
    title: str
    costs: Costs
    low: Costs
    high: Costs
    origins: Mapping[str, Origin]

    def __post_init__(self) -> None:
        for item in ITEMS:
            low, ns, high = (getattr(costs, item) for costs in (self.low, self.costs, self.high))
            if not low <= ns <= high:
                raise CostError(f"{self.name}: {item}: ns={ns} is not within low={low} and high={high}; widen the band")
            if item not in self.origins:
                raise CostError(f"{self.name}: {item} has no origin; give its source, or guess = true")

    @property
    def guesses(self) -> tuple[str, ...]:
        """The items that are guesses."""
        return tuple(item for item in ITEMS if self.origins[item].guess)
