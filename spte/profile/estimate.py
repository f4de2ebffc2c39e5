"""Estimates of a profile: the counts of its rows, epoch by epoch and vCPU by vCPU, times the costs of a machine.

All vCPUs of the VM are taken to run side by side, also while the VMM makes its calls, so that every flush interrupts each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spte.cost import Costs, Stall, VmShape, call_time, guest_stall
from spte.profile.report import HARVEST, Phase, Row


class Estimate(NamedTuple):
    """What logging costs, estimated, ns.

    Parameters
    ----------
    stall : float
        CPU time that all vCPUs lose.
    vmm : float
        Time of the VMM's calls.
    hold : float
        Longest exclusive hold of mmu_lock.
    """

    stall: float
    vmm: float
    hold: float


class RowEstimate(NamedTuple):
    """Estimates of one row.

    Parameters
    ----------
    epochs : tuple of Estimate
        Of each epoch: the guest's phase and its harvest.
    vmm : float
        Time of all calls of the VMM, enabling and disabling included, ns.
    hold : float
        Longest exclusive hold of mmu_lock in all of them, ns.
    """

    epochs: tuple[Estimate, ...]
    vmm: float
    hold: float

    @property
    def stall(self) -> float:
        """CPU time that all vCPUs lose in an epoch, on average, ns."""
        return sum(each.stall for each in self.epochs) / max(1, len(self.epochs))


def shape_of(row: Row, *, running: int | None = None) -> VmShape:
    """Return what of the row's VM decides how its counts add up; by default all its vCPUs run while the VMM makes its calls."""
    return VmShape(row.vcpus, row.vcpus if running is None else running, row.column.on.tdp_mmu, bool(row.column.log.ring_bytes))


def guest_phase(row: Row, phase: Phase, costs: Costs, *, running: int | None = None) -> tuple[float, ...]:
    """Return the time that each vCPU loses in a phase, ns; an access to a page mapped at 4 KiB takes a second-level walk."""
    return _guest(row, phase, costs, shape_of(row, running=running)).vcpus


def vmm_phase(row: Row, phase: Phase, costs: Costs, *, running: int | None = None) -> Estimate:
    """Return what the calls of the VMM in a phase cost: their time, the longest hold, and the CPU time that running vCPUs lose."""
    if not phase.calls:
        return Estimate(0.0, 0.0, 0.0)
    shape = shape_of(row, running=running)
    words = -(-row.npages // 64) if phase.kind in ("enable", "get", "clear") and not shape.ring else 0
    entries = row.ring_entries(phase.iteration) if phase.kind == "collect" else 0
    counts = phase.vmm
    if phase.kind == "disable":
        counts["dropped"] = row.dropped(phase)
    elif phase.kind == "collect" and row.column.on.pml:  # userspace kicks every vCPU, or entries stay in PML buffers
        counts["vcpu_kicks"] = phase.calls * row.vcpus
    all_calls = call_time(phase.kind, counts, costs, shape, words=words, entries=entries)
    largest = call_time(phase.kind, phase.largest, costs, shape, words=words // phase.calls)
    return Estimate(all_calls.stall * shape.running, all_calls.ns, largest.hold)


def estimate(row: Row, costs: Costs) -> RowEstimate:
    """Return the estimates of `row` at `costs`."""
    epochs = tuple(_epoch(row, row.epoch_phases(i), costs) for i in range(len(row.epochs)))
    others = [vmm_phase(row, phase, costs) for phase in row.phases if not phase.iteration]
    return RowEstimate(epochs, sum(each.vmm for each in (*epochs, *others)), max(each.hold for each in (*epochs, *others)))


def _epoch(row: Row, phases: Sequence[Phase], costs: Costs) -> Estimate:
    guest = [_guest(row, phase, costs, shape_of(row)) for phase in phases if phase.kind == "dirty"]
    calls = [vmm_phase(row, phase, costs) for phase in phases if phase.kind in HARVEST]
    return Estimate(
        sum(each.total for each in guest) + sum(each.stall for each in calls),
        sum(each.vmm for each in calls),
        max([each.hold for each in guest] + [each.hold for each in calls], default=0.0),
    )


def _guest(row: Row, phase: Phase, costs: Costs, shape: VmShape) -> Stall:
    small = phase.pages_4k / row.npages
    vcpus = list(phase.vcpus.values())
    return guest_stall(vcpus, costs, shape, walks=[round(each["accesses"] * small) for each in vcpus])
