"""Trials of the 14 patches: a scenario on a fresh VM for each policy, what was counted, and what should have been."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from spte.arrays.records import I64s
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.host.backing import Backing
from spte.platform import PAGE_SIZE, Platform
from spte.policy import Policy
from spte.vm.vm import VM

Value = int | str | tuple[int, ...]
Seen = dict[str, Value]

STEP = {
    "sptes_written": ("sptes_written",), "zapped": ("zapped",), "flushes": ("flushes",), "pml_requests": ("cpu_dirty_logging_requests",),
}  # fmt: skip
AFTER = {"faults_after": ("faults_fast", "faults_slow"), "pml_entries": ("pml_entries",)}
COUNTS = ("sptes_written", "zapped", "faults_after", "flushes", "pml_requests", "pml_entries")
"""What every scenario shows; a zapped SPTE is a written one too. Faults and PML entries are those of the guest after the step."""


class Slot:
    """A memslot of a trial, what it lies on, and its number."""

    def __init__(self, vm: VM, number: int, backing: Backing, gfn: int, npages: int, offset: int, flags: int) -> None:
        self.vm, self.number, self.backing, self.gfn, self.npages, self._offset = vm, number, backing, gfn, npages, offset
        self.set(flags)

    @property
    def gfns(self) -> I64s:
        """Every gfn of the slot, ascending."""
        return np.arange(self.gfn, self.gfn + self.npages)

    def set(self, flags: int, *, gfn: int | None = None) -> None:
        """Create the slot, or give it other flags or another place."""
        self.gfn = self.gfn if gfn is None else gfn
        gpa, size, offset = self.gfn * PAGE_SIZE, self.npages * PAGE_SIZE, self._offset * PAGE_SIZE
        self.vm.set_memory_region(self.number, gpa, size, self.backing, offset=offset, flags=flags)

    def delete(self) -> None:
        """Delete the slot."""
        self.vm.set_memory_region(self.number, 0, 0)

    def log(self, on: bool) -> None:
        """Turn its dirty logging on or off."""
        self.set(LOG_DIRTY_PAGES if on else 0)

    def harvest(self) -> int:
        """GET_DIRTY_LOG, and CLEAR_DIRTY_LOG of all it reports where that is manual; returns the pages reported."""
        bitmap = self.vm.get_dirty_log(self.number)
        if self.vm.manual:
            self.vm.clear_dirty_log(self.number, 0, self.npages, bitmap)
        return int(np.bitwise_count(bitmap).sum())


class Trial:
    """One VM under one policy, and the counts of the step under test and of the guest's accesses after it.

    Parameters
    ----------
    vm : VM
        Fresh; the trial's to change.
    """

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.seen: Seen = dict.fromkeys(COUNTS, 0)
        self._slots = 0

    def slot(self, kind: str, npages: int, *, gfn: int = 0, offset: int = 0, backing_pages: int = 0, flags: int = 0) -> Slot:
        """Create a memslot of `npages` on `backing_pages` (default: as many) of populated memory, from page `offset` of it on."""
        backing = Backing(kind, (backing_pages or npages) * PAGE_SIZE, populate=True)
        self._slots += 1
        return Slot(self.vm, self._slots - 1, backing, gfn, npages, offset, flags)

    def write(self, gfns: npt.ArrayLike, vcpu: int = 0) -> None:
        """Let the guest write each of `gfns`."""
        stop = self.vm.vcpus[vcpu].write(gfns)
        assert stop is None, stop

    def pml_on(self, vcpu: int = 0) -> int:
        """Let `vcpu` enter the guest; returns its PML control there."""
        self.vm.vcpus[vcpu].enter_guest()
        return int(self.vm.vcpus[vcpu].arrays.vcpu[0].pml_enabled)

    def faults(self) -> int:
        """Return the page faults since the VM was made."""
        counters = self.vm.counters()
        return counters["faults_fast"] + counters["faults_slow"]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what the step under test costs."""
        with self._counting(STEP):
            yield

    @contextmanager
    def after(self) -> Iterator[None]:
        """Count what the guest's accesses cost after the step."""
        with self._counting(AFTER):
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Count what steps and accesses cost together."""
        with self._counting(STEP | AFTER):
            yield

    @contextmanager
    def _counting(self, names: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
        before = self.vm.counters()
        yield
        now = self.vm.counters()
        for name, parts in names.items():
            so_far = self.seen[name]
            assert isinstance(so_far, int)
            self.seen[name] = so_far + sum(now[part] - before[part] for part in parts)


Play = Callable[[Trial], None]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A scenario of one patch, or of a whole version.

    Parameters
    ----------
    name : str
        Such as ``"P1-a"``.
    claim : str
        What is set up and what is done, in one line.
    policies : tuple of Policy
        Without and with the decision; a third or fourth where a later one changes the result again.
    play : callable
        Performs it on a `Trial` and leaves further values in `Trial.seen`.
    expected : mapping of str to tuple
        By name of a count or a further value, one for each policy; None where none is specified, but it is worth showing.
    platform : str or Platform
        What the CPU gives.
    manual, vcpus : int
        As `VM` takes them.
    """

    name: str
    claim: str
    policies: tuple[Policy, ...]
    play: Play
    expected: Mapping[str, tuple[Value | None, ...]]
    platform: str | Platform = "ept-nopml"
    manual: int = 0
    vcpus: int = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a scenario showed: one `Seen` a policy."""

    scenario: Scenario
    seen: tuple[Seen, ...]

    @property
    def differences(self) -> list[str]:
        """One line for each value that is not as specified; empty if all are."""
        return [
            f"{name.replace('_', ' ')} under {policy.name}: {got[name]}, expected {want}"
            for name, values in self.scenario.expected.items()
            for policy, got, want in zip(self.scenario.policies, self.seen, values, strict=True)
            if want is not None and got[name] != want
        ]

    @property
    def as_specified(self) -> bool:
        """Every value is what the specification says."""
        return not self.differences


def perform(scenario: Scenario) -> Outcome:
    """Run `scenario` on a fresh VM under each of its policies."""
    found = []
    for policy in scenario.policies:
        with VM(scenario.platform, policy, vcpus=scenario.vcpus, manual=scenario.manual) as vm:
            trial = Trial(vm)
            scenario.play(trial)
            vm.check()
            found.append(trial.seen)
    return Outcome(scenario, tuple(found))
