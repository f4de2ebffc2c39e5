"""Workloads: which vCPU touches which pages in which epoch, in batches, and the guest that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from spte.platform import PAGE_SIZE
from spte.trace import MAX_NPAGES, PAGES_PER_2M, Trace

Gfns = npt.NDArray[np.uint64]

BATCH = 1 << 23
"""Most gfns in one batch: 64 MiB of addresses, so that a guest's size never shows in the memory of its workload."""
LARGEST = MAX_NPAGES // PAGES_PER_2M * PAGES_PER_2M
"""Pages of the largest memslot that is a multiple of 2 MiB."""
MAX_VCPUS = 1024
"""KVM_MAX_VCPUS of a default x86 build."""
BACKINGS = ("4k", "thp", "hugetlb2m", "hugetlb1g", "shm", "devdax2m", "devdax1g")
ORDERS = ("ascending", "random")
MANUALS = (0, 1, 3)
"""args[0] of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: off, ENABLE, ENABLE | INITIALLY_SET."""


class WorkloadError(ValueError):
    """A workload that no guest can have; the message holds the value and the way out."""


class Access(NamedTuple):
    """One batch of one vCPU: `gfns` uint64, in order; `kinds` uint8 (`spte.READ`, `spte.WRITE`), or None: all write."""

    vcpu: int
    gfns: Gfns
    kinds: npt.NDArray[np.uint8] | None = None


class Workload(Protocol):
    """What `spte.profile.profile` asks of a workload; every iterator starts anew and yields the same at each call."""

    @property
    def npages(self) -> int:
        """Guest memory in 4 KiB pages, from gfn 0."""

    @property
    def slots(self) -> int:
        """Number of equal memslots that hold `npages`."""

    @property
    def vcpus(self) -> int:
        """Number of vCPUs."""

    @property
    def backing(self) -> str:
        """Kind of host memory, as `spte.Backing` takes it."""

    @property
    def manual(self) -> int:
        """Bits of manual dirty-log protection: 0, 1 or 3."""

    @property
    def ring_bytes(self) -> int:
        """Size of each vCPU's dirty ring in bytes; 0: bitmaps."""

    @property
    def nepochs(self) -> int:
        """Number of epochs, each followed by a harvest."""

    @property
    def t_ns(self) -> npt.NDArray[np.int64] | None:
        """Bounds of the epochs in ns, int64 [nepochs + 1]; None if the workload knows no time."""

    def populate(self) -> Iterator[Access]:
        """Yield the accesses before dirty logging is enabled."""

    def epoch(self, index: int) -> Iterator[Access]:
        """Yield the accesses of epoch `index`, from 0."""

    def during_disable(self) -> Iterator[Access]:
        """Yield the accesses after each slot's logging was disabled."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the workload, as JSON values."""


@dataclasses.dataclass(frozen=True, eq=False)
class TraceWorkload:
    """A trace's writes in a guest that may be larger than the trace.

    Page p of the guest is written in an epoch if and only if the trace wrote page ``p % trace.npages`` in it: the page
    space of the trace lies side by side again and again, the last copy cut off at the end of memory. So the written
    share of memory in each epoch is the trace's (exactly, if the size is a multiple of the trace's).

    Parameters
    ----------
    trace : Trace
        The recorded writes.
    pages : int, optional
        Guest memory in 4 KiB pages, a multiple of 512 and no less than `trace.npages`; by default `trace.npages`.
    vcpus : int
        The 2 MiB regions of the guest are dealt to the vCPUs in turn: region r is written by vCPU ``r % vcpus``.
    backing : str
        Host memory: one of `BACKINGS`.
    manual : int
        Manual dirty-log protection: one of `MANUALS`.
    ring_bytes : int
        Dirty ring of each vCPU in bytes; 0: bitmaps. The VM checks it.
    order : str
        Order of the writes inside an epoch: ``"ascending"``, or ``"random"`` (shuffled in batches of at most `BATCH`).
    seed : int
        Seed of the random order.

    Raises
    ------
    WorkloadError
        If a parameter is out of range.
    """

    trace: Trace
    pages: int | None = None
    vcpus: int = 1
    backing: str = "thp"
    manual: int = 0
    ring_bytes: int = 0
    order: str = "ascending"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.npages % PAGES_PER_2M:
            raise WorkloadError(f"memory of {self.npages * PAGE_SIZE} bytes is not a multiple of 2 MiB; round it")
        if not self.trace.npages <= self.npages <= MAX_NPAGES:
            raise WorkloadError(
                f"memory of {self.npages * PAGE_SIZE} bytes; this trace in one memslot takes from "
                f"{self.trace.npages * PAGE_SIZE} (its own size) to {LARGEST * PAGE_SIZE}"
            )
        check_vcpus(self.vcpus)
        check_choice("backing", self.backing, BACKINGS)
        check_choice("manual", self.manual, MANUALS)
        check_choice("order", self.order, ORDERS)
        check_seed(self.seed)

    @property
    def npages(self) -> int:
        """Guest memory in 4 KiB pages."""
        return self.trace.npages if self.pages is None else self.pages

    @property
    def slots(self) -> int:
        """One slot holds all memory."""
        return 1

    @property
    def nepochs(self) -> int:
        """The trace's epochs."""
        return self.trace.nepochs

    @property
    def t_ns(self) -> npt.NDArray[np.int64]:
        """The trace's bounds of the epochs, ns."""
        return self.trace.t_ns

    def populate(self) -> Iterator[Access]:
        """Yield a write to every page, ascending."""
        for gfns in ascending(0, self.npages):
            yield from self._deal(gfns)

    def epoch(self, index: int) -> Iterator[Access]:
        """Yield the writes of epoch `index`."""
        one = self.trace.epoch(index).astype(np.uint64)
        if not len(one):
            return
        space = self.trace.npages
        copies = -(-self.npages // space)
        together = max(1, BATCH // len(one))
        rng = np.random.default_rng([self.seed, index])
        for first in range(0, copies, together):
            bases = np.arange(first, min(first + together, copies), dtype=np.uint64) * np.uint64(space)
            gfns = (bases[:, None] + one).reshape(-1)
            gfns = gfns[: np.searchsorted(gfns, np.uint64(self.npages))]
            for start in range(0, len(gfns), BATCH):
                batch = gfns[start : start + BATCH]
                if self.order == "random":
                    rng.shuffle(batch)
                yield from self._deal(batch)

    def during_disable(self) -> Iterator[Access]:
        """Yield nothing: the trace has ended."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """Return the trace's command and size, and the guest's shape."""
        return {
            "kind": "trace",
            "command": self.trace.command,
            "trace_pages": self.trace.npages,
            "guest_pages": self.npages,
            "epochs": self.nepochs,
            "duration_ns": self.trace.duration_ns,
            "vcpus": self.vcpus,
            "backing": self.backing,
            "manual": self.manual,
            "ring_bytes": self.ring_bytes,
            "order": self.order,
            "seed": self.seed,
        }

    def _deal(self, gfns: Gfns) -> Iterator[Access]:
        if self.vcpus == 1:
            yield Access(0, gfns)
            return
        owner = gfns // np.uint64(PAGES_PER_2M) % np.uint64(self.vcpus)
        # A stable sort keeps each vCPU's pages in the order of the epoch.
        by_owner = gfns[np.argsort(owner, kind="stable")]
        counts = np.bincount(owner.astype(np.intp), minlength=self.vcpus)
        for vcpu, part in enumerate(np.split(by_owner, np.cumsum(counts)[:-1])):
            if len(part):
                yield Access(vcpu, part)


def ascending(start: int, end: int) -> Iterator[Gfns]:
    """Yield the gfns [start, end) in order, in batches of at most `BATCH`."""
    for first in range(start, end, BATCH):
        yield np.arange(first, min(first + BATCH, end), dtype=np.uint64)


def check_vcpus(vcpus: int) -> None:
    """Raise WorkloadError if `vcpus` is no number of vCPUs."""
    if not 1 <= vcpus <= MAX_VCPUS:
        raise WorkloadError(f"vcpus={vcpus}; a VM has 1 to {MAX_VCPUS}")


def check_seed(seed: int) -> None:
    """Raise WorkloadError if `seed` is no int64 of 0 or more."""
    if not 0 <= seed < 1 << 63:
        raise WorkloadError(f"seed={seed}; take 0 to {(1 << 63) - 1}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise WorkloadError if `value` of parameter `name` is not among `choices`."""
    if value not in choices:
        raise WorkloadError(f"{name}={value!r}; take one of {', '.join(map(str, choices))}")
