"""The kernel selftest dirty_log_perf_test as a workload: its options, defaults and access pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from spte.access import READ, WRITE
from spte.platform import PAGE_SIZE
from spte.profile.workload import Access, WorkloadError, ascending, check_choice, check_seed, check_vcpus
from spte.trace import MAX_NPAGES

SOURCES = {
    "anonymous": "4k",
    "anonymous_thp": "thp",
    "anonymous_hugetlb_2mb": "hugetlb2m",
    "anonymous_hugetlb_1gb": "hugetlb1g",
    "shmem": "shm",
}
"""Backing sources by the selftest's names; its plain `anonymous` memory is madvised MADV_NOHUGEPAGE, hence 4k."""
MAX_SLOTS = 32763
"""User memslots (KVM_CAP_NR_MEMSLOTS = 32764) without the one that holds the selftest's own code."""
MAX_PAGES = 1 << 33
"""32 TiB: more page tables than a host can hold."""
MANUAL_PROTECT = 3
"""KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET: what the selftest turns on where KVM offers it."""


@dataclasses.dataclass(frozen=True)
class PerfTest:
    """dirty_log_perf_test: vCPUs populate their memory, then touch all of it once an iteration.

    vCPUs run one after the other here; each has its own share of memory unless `overlap`. The defaults are the
    selftest's.

    Parameters
    ----------
    vcpus : int
        ``-v``: number of vCPUs.
    bytes_per_vcpu : int
        ``-b``: memory of each vCPU, a multiple of 4096. All memory is the sum, also with `overlap`.
    source : str
        ``-s``: one of `SOURCES`.
    overlap : bool
        ``-o``: every vCPU touches all memory.
    memslots : int
        ``-x``: number of equal memslots; it divides the number of pages.
    write_percent : int
        ``-w``: chance that a touch is a write, else it is a read; populating always writes.
    random_access : bool
        ``-a``: as many touches, each of a random page of the vCPU's; populating goes in order.
    no_manual_protect : bool
        ``-g``: GET clears; otherwise manual protect with initially-set is on.
    run_while_disabling : bool
        ``-e``: after each slot's logging was disabled, every vCPU touches all its memory once more.
    iterations : int
        ``-i``: number of iterations.
    seed : int
        ``-r``: seed of the random choices (NumPy's generator, not the selftest's).

    Raises
    ------
    WorkloadError
        If a parameter is out of range.
    """

    vcpus: int = 1
    bytes_per_vcpu: int = 1 << 30
    source: str = "anonymous"
    overlap: bool = False
    memslots: int = 1
    write_percent: int = 100
    random_access: bool = False
    no_manual_protect: bool = False
    run_while_disabling: bool = False
    iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_vcpus(self.vcpus)
        check_choice("source", self.source, tuple(SOURCES))
        check_seed(self.seed)
        if self.bytes_per_vcpu <= 0 or self.bytes_per_vcpu % PAGE_SIZE:
            raise WorkloadError(
                f"bytes_per_vcpu={self.bytes_per_vcpu} is not a positive multiple of {PAGE_SIZE}; round it"
            )
        if not 1 <= self.memslots <= MAX_SLOTS:
            raise WorkloadError(f"memslots={self.memslots}; take 1 to {MAX_SLOTS}")
        if self.npages % self.memslots:
            raise WorkloadError(f"{self.npages} pages can not be divided into memslots={self.memslots}; take a divisor")
        if self.npages // self.memslots > MAX_NPAGES or self.npages > MAX_PAGES:
            raise WorkloadError(
                f"bytes_per_vcpu={self.bytes_per_vcpu} x {self.vcpus} vCPUs in {self.memslots} memslots; "
                f"a slot holds up to {MAX_NPAGES} pages and a guest here up to {MAX_PAGES}; take less"
            )
        if not 0 <= self.write_percent <= 100:
            raise WorkloadError(f"write_percent={self.write_percent}; take 0 to 100")
        if self.iterations < 1:
            raise WorkloadError(f"iterations={self.iterations}; take 1 or more")

    @property
    def npages(self) -> int:
        """Guest memory in 4 KiB pages."""
        return self.vcpus * self.bytes_per_vcpu // PAGE_SIZE

    @property
    def slots(self) -> int:
        """``-x``."""
        return self.memslots

    @property
    def backing(self) -> str:
        """Kind of host memory of ``-s``."""
        return SOURCES[self.source]

    @property
    def manual(self) -> int:
        """3, or 0 with ``-g``."""
        return 0 if self.no_manual_protect else MANUAL_PROTECT

    @property
    def ring_bytes(self) -> int:
        """The selftest reads bitmaps."""
        return 0

    @property
    def nepochs(self) -> int:
        """``-i``."""
        return self.iterations

    @property
    def t_ns(self) -> None:
        """An iteration lasts as long as its touches; there is no time beside that."""
        return

    def populate(self) -> Iterator[Access]:
        """Yield a write to every page of every vCPU, in order."""
        for vcpu in range(self.vcpus):
            for gfns in ascending(*self._share(vcpu)):
                yield Access(vcpu, gfns)

    def epoch(self, index: int) -> Iterator[Access]:
        """Yield one touch for each page of every vCPU."""
        return self._touch(index)

    def during_disable(self) -> Iterator[Access]:
        """Yield with ``-e`` one more round of touches, else nothing."""
        return self._touch(self.iterations) if self.run_while_disabling else iter(())

    def describe(self) -> dict[str, Any]:
        """Return the options under the names of the parameters."""
        return {
            "kind": "perf-test",
            **dataclasses.asdict(self),
            "guest_pages": self.npages,
            "backing": self.backing,
            "manual": self.manual,
            "ring_bytes": self.ring_bytes,
        }

    def _share(self, vcpu: int) -> tuple[int, int]:
        if self.overlap:
            return 0, self.npages
        share = self.bytes_per_vcpu // PAGE_SIZE
        return vcpu * share, (vcpu + 1) * share

    def _touch(self, round_: int) -> Iterator[Access]:
        for vcpu in range(self.vcpus):
            rng = np.random.default_rng([self.seed, round_, vcpu])
            start, end = self._share(vcpu)
            for in_order in ascending(start, end):
                gfns = rng.integers(start, end, len(in_order), np.uint64) if self.random_access else in_order
                kinds = None
                if self.write_percent < 100:
                    writes = rng.integers(0, 100, len(gfns), np.uint8) < self.write_percent
                    kinds = np.where(writes, np.uint8(WRITE), np.uint8(READ))
                yield Access(vcpu, gfns, kinds)
