"""A published run on the model: its counts, and the seconds that costs make of them."""

from __future__ import annotations

from spte.cost import Costs
from spte.cost.estimate import ENTRIES
from spte.papers.published import Run
from spte.platform import PAGE_SIZE
from spte.profile.estimate import guest_phase, vmm_phase
from spte.profile.perf_test import PerfTest
from spte.profile.report import Phase, Row
from spte.profile.run import profile


def perform(run: Run) -> Row:
    """Return what the model did: the run at its real size, every vCPU, every page."""
    (row,) = profile(PerfTest(**run.options, iterations=run.iterations), (run.platform,), (run.policy,))
    return row


def phase_of(row: Row, name: str) -> Phase:
    """Return the phase of that name, such as ``"enable"`` or ``"clear 2"``."""
    kind, _, iteration = name.partition(" ")
    return next(phase for phase in row.phases if phase.kind == kind and phase.iteration == int(iteration or 0))


def slowest(row: Row, name: str, costs: Costs) -> int:
    """Return the index of the vCPU that loses most in a phase, among those that ran in it; 0 if none ran."""
    times = guest_phase(row, phase_of(row, name), costs)
    return times.index(max(times)) if times else 0


def seconds(run: Run, row: Row, name: str, costs: Costs, vcpu: int | None = None) -> float:
    """Return the estimated time of a phase as dirty_log_perf_test takes it, s.

    Dirty memory time ends when the slowest vCPU has touched all its memory, or the one given. vCPUs do not run in the other phases,
    but with ``-e`` while logging is disabled.
    """
    phase = phase_of(row, name)
    if phase.kind == "dirty":
        return guest_phase(row, phase, costs)[slowest(row, name, costs) if vcpu is None else vcpu] * 1e-9
    running = row.vcpus if phase.kind == "disable" and run.options.get("run_while_disabling") else 0
    return vmm_phase(row, phase, costs, running=running).vmm * 1e-9


def counted(row: Row) -> dict[str, int]:
    """Return the counts that were published of some runs: `flushes` while disabling, and `faults` of the whole run.

    Faults are those on the memory that the guest touches, and those of the CPU's walks of the guest's own page tables, whose pages lie
    in another slot, mapped at 4 KiB, and are first touched by a walk.
    """
    tables = PerfTest(bytes_per_vcpu=guest_table_pages(row.npages) * PAGE_SIZE, source="anonymous", iterations=1)
    (walked,) = profile(tables, (row.platform,), (row.column.policy,))
    return {
        "flushes": phase_of(row, "disable").vmm["flushes"],
        "faults": sum(_faults(phase) for phase in row.phases) + _faults(phase_of(walked, "populate")),
    }


def guest_table_pages(npages: int) -> int:
    """Return the pages of the guest's four levels of page tables, which map its memory at 4 KiB from a multiple of 1 GiB on."""
    return sum(-(-npages // ENTRIES**level) for level in (1, 2, 3, 4))


def _faults(phase: Phase) -> int:
    return phase.counts["faults_fast"] + phase.counts["faults_slow"]
