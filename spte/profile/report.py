"""What a profile reports: phases with exact counts and measured seconds, epochs, and one row a column."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.profile.columns import Column

HARVEST = ("get", "clear", "collect", "reset")
"""Kinds of phases that make a harvest: GET, with manual protect CLEAR; of dirty rings collect and reset."""


@dataclasses.dataclass(slots=True)
class Phase:
    """One phase of one VM: what it did (exact) and how long it took here (measured).

    Parameters
    ----------
    kind : str
        ``"populate"``, ``"enable"``, ``"dirty"``, one of `HARVEST`, ``"disable"``, or ``"retouch"``.
    iteration : int
        From 1; 0 outside iterations.
    counts : dict of str to int
        Changes of `VM.counters`; and `masks`, the words of 64 pages of which the harvest reported any (of a ring: how often the next
        entry lies in another word).
    vcpus : dict of int to dict of str to int
        Of each vCPU that ran, the changes while it ran, and its `accesses`.
    calls : int
        Calls of the VMM: slots, chunks of slots, harvests of rings.
    largest : dict of str to int
        Changes by the call that wrote most SPTEs.
    pages_4k : int
        Pages mapped at 4 KiB when the phase ended.
    seconds : float
        Time inside the library, s.
    """

    kind: str
    iteration: int
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    vcpus: dict[int, dict[str, int]] = dataclasses.field(default_factory=dict)
    calls: int = 0
    largest: dict[str, int] = dataclasses.field(default_factory=dict)
    pages_4k: int = 0
    seconds: float = 0.0

    @property
    def vmm(self) -> dict[str, int]:
        """Changes by the calls of the VMM alone: `counts` without those of vCPUs that ran."""
        return {name: value - sum(vcpu[name] for vcpu in self.vcpus.values()) for name, value in self.counts.items()}

    @property
    def name(self) -> str:
        """The phase in the words of dirty_log_perf_test, which knows no rings."""
        return {
            "populate": "Populate memory time",
            "enable": "Enabling dirty logging time",
            "dirty": f"Iteration {self.iteration} dirty memory time",
            "get": f"Iteration {self.iteration} get dirty log time",
            "clear": f"Iteration {self.iteration} clear dirty log time",
            "collect": f"Iteration {self.iteration} collect dirty rings time",
            "reset": f"Iteration {self.iteration} reset dirty rings time",
            "disable": "Disabling dirty logging time",
            "retouch": "Retouch memory time",
        }[self.kind]


@dataclasses.dataclass(frozen=True, slots=True)
class Epoch:
    """What one iteration wrote and what its harvest reported, in distinct pages.

    Of those reported that were not written, `initially_set` were dirty since logging began with KVM_DIRTY_LOG_INITIALLY_SET,
    `over_reported` for no such reason.
    """

    written: int
    reported: int
    initially_set: int
    over_reported: int
    lost: int
    first_lost: int | None


def compare(written: npt.NDArray[np.uint64], logs: Sequence[npt.NDArray[np.uint64]], per_slot: int, others: str) -> Epoch:
    """Return what an epoch wrote and what its harvest reported.

    Parameters
    ----------
    written : ndarray of uint64[slots, words]
        Bitmap of the pages written, a row a slot.
    logs : sequence of ndarray of uint64[words]
        Bitmap of the pages reported, one a slot.
    per_slot : int
        Pages of a slot.
    others : str
        What pages are that were reported and not written: ``"initially_set"`` or ``"over_reported"``.
    """
    total: dict[str, Any] = {"written": 0, "reported": 0, "initially_set": 0, "over_reported": 0, "lost": 0}
    first_lost = None
    for slot, log in enumerate(logs):
        expected = written[slot]
        missing = expected & ~log
        for name, words in (
            ("written", expected),
            ("reported", log),
            (others, log & ~expected),
            ("lost", missing),
        ):
            total[name] += int(np.bitwise_count(words).sum(dtype=np.int64))
        if first_lost is None and (at := np.flatnonzero(missing)).size:
            word = int(missing[at[0]])
            first_lost = slot * per_slot + int(at[0]) * 64 + (word & -word).bit_length() - 1
    return Epoch(**total, first_lost=first_lost)


@dataclasses.dataclass(frozen=True, slots=True)
class Threads:
    """What vCPUs on threads did that went on during harvests; all but `lost` and `first_lost` depends on timing.

    Parameters
    ----------
    vcpus_beside : bool
        vCPUs ran side by side; else they took turns.
    harvests_beside : bool
        Harvests went beside them; else each call of a harvest stopped them until its end.
    harvests : int
        Harvests of all slots, or of all rings.
    writes : int
        Guest accesses that ended while one harvest followed another, without the last, unfinished batch of each vCPU.
    seconds : float
        How long that was, s.
    wait_s : float
        Of this, how long harvests waited for vCPUs.
    reported : int
        Pages reported, summed over the harvests.
    counts : dict of str to int
        Changes of `VM.counters` from when logging was enabled until it was disabled.
    disable_s : float or None
        How long it took to disable while vCPUs went on, s; None if they had stopped.
    lost : int
        Pages that were written and that the next harvest did not report; anything but 0 breaks the contract.
    first_lost : int or None
        The first of them.
    """

    vcpus_beside: bool
    harvests_beside: bool
    harvests: int
    writes: int
    seconds: float
    wait_s: float
    reported: int
    counts: dict[str, int]
    disable_s: float | None
    lost: int
    first_lost: int | None

    @property
    def writes_per_s(self) -> float | None:
        """Guest accesses a second while harvests ran; None if no vCPU had any."""
        return self.writes / self.seconds if self.seconds else None

    @property
    def wait_s_per_harvest(self) -> float | None:
        """How long a harvest waited for vCPUs, s; None if there was none."""
        return self.wait_s / self.harvests if self.harvests else None


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What one column did.

    Parameters
    ----------
    column : Column
        Platform, policy, way to log, host memory.
    vcpus, npages : int
        vCPUs, and guest memory in 4 KiB pages.
    phases : tuple of Phase
        In order of time.
    epochs : tuple of Epoch
        One an iteration.
    accesses : int
        Guest accesses of all iterations.
    leafs : dict of str to dict of str to int
        `pages_4k`, `pages_2m` and `pages_1g` after ``"populate"``, after the last harvest (``"logging"``) and after
        ``"disable"``.
    t_ns : int64 [iterations + 1], optional
        The workload's time, ns.
    populated : Epoch, optional
        What populating wrote and its harvest reported, if logging began with the slots.
    threads : Threads, optional
        What the same guest did with its vCPUs on threads, in a run of its own.
    """

    column: Column
    vcpus: int
    npages: int
    phases: tuple[Phase, ...]
    epochs: tuple[Epoch, ...]
    accesses: int
    leafs: dict[str, dict[str, int]]
    t_ns: npt.NDArray[np.int64] | None
    populated: Epoch | None = None
    threads: Threads | None = None

    @property
    def platform(self) -> str:
        """Name of the platform."""
        return self.column.platform

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return self.column.policy.name

    def dropped(self, phase: Phase) -> int:
        """Return how many pages fewer are mapped at 4 KiB after `phase` than before it."""
        before = self.phases[self.phases.index(phase) - 1]
        return max(0, before.pages_4k - phase.pages_4k)

    def ring_entries(self, iteration: int) -> int:
        """Return the entries that dirty rings held in an iteration: the pages that it marked."""
        return sum(phase.counts["dirty_marks"] for phase in self.phases if phase.iteration == iteration and phase.kind not in HARVEST)

    def epoch_phases(self, index: int) -> list[Phase]:
        """Return the phases of epoch `index`, from 0: the guest's, then its harvest."""
        return [phase for phase in self.phases if phase.iteration == index + 1]

    def count(self, name: str, *kinds: str) -> int:
        """Return the sum of count `name` over the phases of `kinds`, or over all but populate."""
        return sum(p.counts[name] for p in self.phases if (p.kind in kinds if kinds else p.kind != "populate"))

    def seconds(self, *kinds: str) -> float:
        """Return the measured time of the phases of `kinds`, s."""
        return sum(p.seconds for p in self.phases if p.kind in kinds)

    @property
    def written(self) -> int:
        """Pages written, summed over the epochs."""
        return sum(e.written for e in self.epochs)

    @property
    def reported(self) -> int:
        """Pages reported, summed over the epochs."""
        return sum(e.reported for e in self.epochs)

    @property
    def initially_set(self) -> int:
        """Pages reported without a write because all were dirty when logging began."""
        return sum(e.initially_set for e in self.epochs)

    @property
    def over_reported(self) -> int:
        """Pages reported in an epoch that did not write them, beside those initially set."""
        return sum(e.over_reported for e in self.epochs)

    @property
    def lost(self) -> int:
        """Pages written in an epoch whose harvest did not report them, populating included; anything but 0 breaks the contract."""
        return sum(e.lost for e in (*self.epochs, self.populated) if e is not None)

    @property
    def dirty_pages_per_s(self) -> float | None:
        """Pages written a second of the workload's own time; None if it knows no time."""
        duration = 0 if self.t_ns is None else int(self.t_ns[-1] - self.t_ns[0])
        return self.written * 1e9 / duration if duration else None

    @property
    def harvest_pages_per_s(self) -> float | None:
        """Measured: pages reported a second of harvest; None if there were none."""
        seconds = self.seconds(*HARVEST)
        return self.reported / seconds if self.reported and seconds else None

    @property
    def enable_s_per_spte(self) -> float | None:
        """Measured: seconds of enabling for each SPTE it wrote; None if it wrote none."""
        sptes = self.count("sptes_written", "enable")
        return self.seconds("enable") / sptes if sptes else None

    @property
    def guest_accesses_per_s(self) -> float | None:
        """Measured: guest accesses a second of dirty memory time; None if there were none."""
        seconds = self.seconds("dirty")
        return self.accesses / seconds if self.accesses and seconds else None
