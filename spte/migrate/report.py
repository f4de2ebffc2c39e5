"""What a migration reports: its rounds, how it ended, and what it left behind on the source."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.platform import PAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One round: pages sent, and what the harvest at its end found.

    Parameters
    ----------
    index : int
        From 1; round 1 sends all memory.
    start_ns, duration_ns : int
        When it began, since the migration did, and how long it took, ns.
    sent : int
        Pages sent.
    dirtied : int, optional
        Pages that the harvest reported; None: the migration was cancelled before it.
    remaining : int
        Pages to be sent after it.
    stall_ns : int, optional
        Estimated: time that dirty logging took from the guest, all vCPUs together, ns; None without costs.
    vmm_ns : int, optional
        Estimated: time of the VMM in ioctls, ns; None without costs.
    throttle_percent : int
        Share of the time that every vCPU slept.
    dirty_limit : int, optional
        Bytes a second that each vCPU might dirty.
    counts : dict of str to int
        Changes of `VM.counters`.
    """

    index: int
    start_ns: int
    duration_ns: int
    sent: int
    dirtied: int | None
    remaining: int
    stall_ns: int | None
    vmm_ns: int | None
    throttle_percent: int
    dirty_limit: int | None
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Downtime:
    """Parts of the time in which the guest stood still, ns: the last harvest, the last pages, and what no page takes."""

    harvest_ns: int
    pages_ns: int
    fixed_ns: int

    @property
    def total_ns(self) -> int:
        """All parts together."""
        return self.harvest_ns + self.pages_ns + self.fixed_ns


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What dirty logging left on the source, once it was turned off and the guest had written all its memory once more.

    Parameters
    ----------
    huge_before, huge_logging, huge_after : int
        2 MiB pages before logging, at its end, and after it was turned off and memory was written.
    refaults : int
        Faults that this writing took.
    pending : int
        Pages that it marked as dirty, and entries that are left in PML buffers or rings: 0, or logging is not off.
    logging_slots : int
        Memslots that still log.
    """

    huge_before: int
    huge_logging: int
    huge_after: int
    refaults: int
    pending: int
    logging_slots: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a migration ended.

    Parameters
    ----------
    converged : bool
        The guest moved; else the migration was cancelled at its longest time.
    total_ns : int
        From the beginning to the guest's start on the other side, or to the cancel, ns.
    downtime : Downtime, optional
        None if it was cancelled.
    sent : int
        Pages sent, those of the last stop included.
    rounds : tuple of Round
        In order of time.
    lost : uint64 array
        Pages that the destination has in an older version than the source, ascending.
    enable_ns : int, optional
        Estimated: how long turning logging on took the VMM, ns; None without costs.
    source : Source
        What is left on the source.
    """

    converged: bool
    total_ns: int
    downtime: Downtime | None
    sent: int
    rounds: tuple[Round, ...]
    lost: npt.NDArray[np.uint64]
    enable_ns: int | None
    source: Source

    @property
    def bytes_sent(self) -> int:
        """Bytes of pages that went over the link."""
        return self.sent * PAGE_SIZE

    @property
    def stall_ns(self) -> int | None:
        """Estimated: time that dirty logging took from the guest while it ran, ns; None without costs."""
        return None if self.enable_ns is None else sum(one.stall_ns or 0 for one in self.rounds)

    @property
    def throttle_percent(self) -> int:
        """The strongest share of time that every vCPU slept."""
        return max((one.throttle_percent for one in self.rounds), default=0)

    def figures(self) -> dict[str, int | bool | None]:
        """Return how it ended as one row: times in ns, `down_ns` is the downtime, bytes, pages, faults."""
        downtime, last = self.downtime, self.rounds[-1] if self.rounds else None
        return {
            "converged": self.converged,
            "total_ns": self.total_ns,
            "down_ns": None if downtime is None else downtime.total_ns,
            "down_harvest_ns": None if downtime is None else downtime.harvest_ns,
            "down_pages_ns": None if downtime is None else downtime.pages_ns,
            "bytes_sent": self.bytes_sent,
            "rounds": len(self.rounds),
            "stall_ns": self.stall_ns,
            "throttle_percent": self.throttle_percent,
            "dirty_limit": None if last is None else last.dirty_limit,
            "lost_pages": len(self.lost),
            "refaults": self.source.refaults,
        }

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values; of the pages lost at most the first hundred."""
        return {
            "converged": self.converged,
            "total_ns": self.total_ns,
            "downtime_ns": None if self.downtime is None else {**dataclasses.asdict(self.downtime), "total_ns": self.downtime.total_ns},
            "pages_sent": self.sent,
            "bytes_sent": self.bytes_sent,
            "enable_ns": self.enable_ns,
            "stall_ns": self.stall_ns,
            "lost": {"pages": len(self.lost), "first": self.lost[:100].tolist()},
            "source": dataclasses.asdict(self.source),
            "rounds": [dataclasses.asdict(one) for one in self.rounds],
        }
