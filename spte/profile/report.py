"""What a profile reports: phases with exact counts and measured seconds, epochs, and one row a column."""

from __future__ import annotations

import dataclasses

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
