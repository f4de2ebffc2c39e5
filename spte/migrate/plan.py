"""What a migration is asked to do, checked before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from spte._arguments import index, instance, integer
from spte.cost import Costs
from spte.errors import KvmError
from spte.host.backing import checked_size
from spte.platform import PAGE_SIZE
from spte.policy import parse
from spte.profile.columns import INITIALLY_SET, check_chunk
from spte.profile.workload import TraceWorkload
from spte.trace import PAGES_PER_2M
from spte.vm.capabilities import RING_SIZE_BITS, arguments

LOGS = ("bitmap", "manual", "initially-set", "ring")
"""How dirty pages are learned: GET alone, GET with CLEAR just before a page is sent, that with all pages dirty at first, dirty rings."""
THROTTLES = ("none", "auto-converge", "dirty-limit")
AFTER = ("repeat", "idle")
CHUNK_PAGES = 1 << 18
"""Pages of one CLEAR: QEMU's default, clear-bitmap-shift 18, is 1 GiB."""
RING_BYTES = 1 << 16
"""4096 entries a vCPU, as QEMU's own tests of migration take (dirty-ring-size=4096)."""
VCPU_DIRTY_LIMIT = 1 << 20
"""Bytes a second: QEMU's default of vcpu-dirty-limit, 1 MB/s, counted there in MiB."""
DOWNTIME_NS = 300_000_000
"""QEMU's default of downtime-limit."""
FIXED_NS = 20_000_000
"""An assumption: what devices and the start on the other side take depends on the machine; measure it there."""
MAX_NS = 120 * 10**9
LONGEST_NS = 10**15
MOST = 10**13


class MigrateError(ValueError):
    """A migration that can not be done; the message holds the value and the way out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One migration: the guest and its writes, the platform, the link, and how pages are logged and sent.

    Parameters
    ----------
    workload : TraceWorkload
        The guest and its writes. Inside an epoch a vCPU's writes are spread evenly, in the order of `workload.order`. How dirty
        pages are logged is `log`'s business; its `manual` and `ring_bytes` are not looked at.
    bandwidth : int
        Bytes a second of the link.
    downtime_ns : int
        Longest time that the guest may stand still at the end, ns.
    platform : str
        Name of the platform.
    policy : str
        Kernel version, single decisions replaced, as `spte.policy.parse` reads it.
    log : str
        One of `LOGS`.
    chunk_pages : int
        Pages of one CLEAR, a multiple of 64; of `manual` and `initially-set`.
    ring_bytes : int
        Size of each vCPU's dirty ring; of `ring`.
    fixed_ns : int
        Part of the downtime that no page takes: the state of devices, and the start on the other side, ns.
    throttle : str
        One of `THROTTLES`.
    vcpu_dirty_limit : int
        Bytes a second that each vCPU may dirty once `dirty-limit` acts.
    after : str
        What the guest does when the trace has ended: ``repeat`` it, or stay ``idle``.
    stop_ns : int, optional
        When the guest stops writing, ns since the migration began.
    max_ns : int
        When the migration is cancelled, ns since it began.
    nested : bool
        L2 does the writing: each vCPU enters it once L1 has populated memory.
    costs : Costs, optional
        What counts cost; None: dirty logging takes no time, neither the guest's nor the VMM's.

    Raises
    ------
    MigrateError, WorkloadError
        If a parameter is out of range, or a VM or its memory refuses them together, as rings with a policy that has none.
    TypeError
        If one is of a wrong type.
    """

    workload: TraceWorkload
    bandwidth: int = 1_250_000_000
    downtime_ns: int = DOWNTIME_NS
    platform: str = "ept-pml"
    policy: str = "6.12"
    log: str = "bitmap"
    chunk_pages: int = CHUNK_PAGES
    ring_bytes: int = RING_BYTES
    fixed_ns: int = FIXED_NS
    throttle: str = "none"
    vcpu_dirty_limit: int = VCPU_DIRTY_LIMIT
    after: str = "repeat"
    stop_ns: int | None = None
    max_ns: int = MAX_NS
    nested: bool = False
    costs: Costs | None = None

    def __post_init__(self) -> None:
        trace = instance(self.workload, "workload", TraceWorkload, "a TraceWorkload").trace
        if self.costs is not None:
            instance(self.costs, "costs", Costs, "Costs, such as spte.cost.load(name).costs")
        for name, choices in (("log", LOGS), ("throttle", THROTTLES), ("after", AFTER)):
            if instance(getattr(self, name), name, str, "a name") not in choices:
                raise MigrateError(f"{name}={getattr(self, name)!r}; take one of {', '.join(choices)}")
        if not trace.writes or not trace.duration_ns:
            lacks = "writes no page" if not trace.writes else "lasts 0 ns"
            raise MigrateError(f"the trace {lacks}; a migration needs writes in time: record or generate another")
        if not 1 <= index(self.bandwidth, "bandwidth") <= MOST:
            raise MigrateError(f"bandwidth={self.bandwidth} bytes/s; take 1 to {MOST}, such as 1250000000 (10 Gbit/s)")
        check_chunk(index(self.chunk_pages, "chunk_pages"))
        if not PAGE_SIZE <= index(self.vcpu_dirty_limit, "vcpu_dirty_limit") <= MOST:
            raise MigrateError(f"vcpu_dirty_limit={self.vcpu_dirty_limit} bytes/s; take {PAGE_SIZE} (a page a second) to {MOST}")
        if self.throttle == "dirty-limit" and self.log != "ring":
            raise MigrateError(f"throttle='dirty-limit' with log={self.log!r}; it counts what each vCPU puts on its ring: take log='ring'")
        for name in ("downtime_ns", "fixed_ns", "max_ns", *(["stop_ns"] if self.stop_ns is not None else [])):
            integer(getattr(self, name), name, MigrateError, 0, LONGEST_NS + 1)
        if self.downtime_ns <= self.fixed_ns:
            raise MigrateError(
                f"a downtime of {self.downtime_ns / 1e6:g} ms is not above its fixed part of {self.fixed_ns / 1e6:g} ms, which no page "
                "takes; allow more, or lower the fixed part"
            )
        self._check_guest()

    def _check_guest(self) -> None:
        """Refuse what the VM or its memory would refuse, by their own checks."""
        ring = self.log == "ring"
        ring_bytes = integer(self.ring_bytes, "ring_bytes", MigrateError, int(ring), 1 << RING_SIZE_BITS)
        try:
            arguments(
                self.platform, parse(self.policy), vcpus=self.workload.vcpus, manual=self.manual, ring_bytes=ring_bytes if ring else 0
            )
            checked_size(self.workload.backing, self.npages * PAGE_SIZE)
        except KvmError as error:
            raise MigrateError(str(error.strerror)) from None

    @property
    def npages(self) -> int:
        """Pages of the memslot: the workload's, and behind them L1's tables for L2 if the plan is nested."""
        pages = self.workload.npages
        return pages + (_table_pages(pages) if self.nested else 0)

    @property
    def manual(self) -> int:
        """Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 for `log`."""
        return {"manual": 1, "initially-set": INITIALLY_SET}.get(self.log, 0)

    def wire_ns(self, pages: int) -> int:
        """Return how long `pages` pages are on the link, ns."""
        return pages * PAGE_SIZE * 10**9 // self.bandwidth

    def describe(self) -> dict[str, Any]:
        """Return the parameters by name, as JSON values; the workload as `TraceWorkload.describe` tells it."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in ("workload", "costs")}
        return {**own, "costs": None if self.costs is None else dataclasses.asdict(self.costs), "workload": self.workload.describe()}


def _table_pages(npages: int) -> int:
    """Return the pages for tables that map `npages` by 2 MiB pages, four levels, as a multiple of 2 MiB."""
    regions = -(-npages // PAGES_PER_2M)
    tables, level = 0, regions
    for _ in range(3):
        level = -(-level // 512)
        tables += level
    return -(-tables // PAGES_PER_2M) * PAGES_PER_2M
