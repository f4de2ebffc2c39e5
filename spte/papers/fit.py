"""Costs fitted on published times: least squares of the relative errors, no cost below 0, all other costs as they are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.cost import CostProfile, Costs, Origin
from spte.cost.costs import ITEMS
from spte.papers.model import seconds, slowest
from spte.papers.published import Run, experiments
from spte.profile.report import Row


class Machine(NamedTuple):
    """What is fitted of a published machine: on which experiments, on which of their runs (by the labels' beginning), and which costs."""

    experiments: tuple[str, ...]
    runs: str
    items: tuple[str, ...]


MACHINES = {
    "matlack": Machine(("F1", "F3"), "", (
        "fast_fault", "slow_fault_shared", "shared_contention", "split", "pml_log", "bitmap_word", "mask_walk", "clear_page", "walk_2d",
    )),
    "skylake": Machine(("F4",), "Skylake", (
        "shared_contention", "slow_fault_exclusive", "get_word", "mask_walk", "clear_page", "flush_request", "zap",
    )),
    "haswell": Machine(("F4",), "Haswell", (
        "fast_fault", "slow_fault_exclusive", "split", "mask_walk", "clear_page", "flush_request", "zap",
    )),
}  # fmt: skip
"""By the name of the cost profile. F4 has one figure of slow faults under shared mmu_lock, so that of their costs contention is fitted."""
COUNTS = 0.05
"""A time tells of a cost if that makes up at least this part of its estimate; the errors of those times are the cost's band."""


class Measured(NamedTuple):
    """A run, what the model did, and the phase whose time was published."""

    run: Run
    row: Row
    phase: str

    @property
    def published(self) -> float:
        """The published time, s."""
        return self.run.seconds[self.phase]


def measured(name: str, rows: Mapping[str, Mapping[str, Row]]) -> list[Measured]:
    """Return the published times that tell of a machine of `MACHINES`; `rows` by experiment and label of the run."""
    machine = MACHINES[name]
    runs = [(each.name, run) for each in experiments(*machine.experiments) for run in each.runs if run.label.startswith(machine.runs)]
    return [Measured(run, rows[of][run.label], phase) for of, run in runs for phase in run.seconds]


def fit(name: str, times: Sequence[Measured], known: CostProfile) -> CostProfile:
    """Return `known` with the costs of a machine of `MACHINES` such that the estimates come nearest to what was measured.

    Parameters
    ----------
    name : str
        The machine, and name of the profile returned.
    times : sequence of Measured
        The times to fit. Their estimates are to be linear in the costs: mmu_lock shared all the time, or the lock exclusive and busy.
    known : CostProfile
        Where all other costs are taken from.

    Returns
    -------
    CostProfile
        The band of a fitted cost spans the relative errors of the times that tell of it.
    """
    items, about = MACHINES[name].items, experiments(*MACHINES[name].experiments)
    published = np.array([each.published for each in times])
    unit = {item: Costs.only(**{item: 1.0}) for item in ITEMS}
    vcpus = [slowest(each.row, each.phase, known.costs) for each in times]  # one and the same for all costs: then they add up
    parts = np.array([[seconds(*each, unit[item], vcpu) for item in ITEMS] for each, vcpu in zip(times, vcpus, strict=True)])
    parts /= published[:, None]
    fitted = [ITEM_INDEX[item] for item in items]
    values = np.array([getattr(known.costs, item) for item in ITEMS], np.float64)
    values[fitted] = 0.0
    values[fitted] = nonnegative_least_squares(parts[:, fitted], 1.0 - parts @ values)
    shares = parts * values
    estimated = shares.sum(1)
    new: list[dict[str, float]] = [{}, {}, {}]
    for item in items:
        i = ITEM_INDEX[item]
        telling = shares[:, i] >= COUNTS * estimated
        factors = [1.0, *(1.0 / estimated[telling])]  # published over estimated
        for column, factor in zip(new, (1.0, min(factors), max(factors)), strict=True):
            column[item] = float(values[i] * factor)
    columns = zip((known.costs, known.low, known.high), new, strict=True)
    costs, low, high = (dataclasses.replace(old, **changed) for old, changed in columns)
    machine = f"{MACHINES[name].runs or 'unnamed'}, up to {max(each.row.vcpus for each in times)} vCPUs"
    source = "least squares by spte papers on " + "; ".join(f"{each.name}: {each.source}" for each in about)
    origin = Origin(source, max(each.date for each in about), machine)
    title = f"machine of {' and '.join(each.name for each in about)} ({machine}): fitted by spte papers, the rest as in {known.name}"
    return CostProfile(name, title, costs, low, high, {**known.origins, **dict.fromkeys(items, origin)})


ITEM_INDEX = {item: i for i, item in enumerate(ITEMS)}


def nonnegative_least_squares(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return x >= 0, float64 [columns of `a`], that minimizes ``|a @ x - b|``: the active-set method of Lawson and Hanson."""
    columns = a.shape[1]
    x, free = np.zeros(columns), np.zeros(columns, bool)
    norms = np.linalg.norm(a, axis=0)
    norms[norms == 0] = 1.0
    a = a / norms  # costs of a word and of a fault differ a thousandfold in what they weigh
    least = 1e-12 * float(np.linalg.norm(b))
    for _ in range(30 * columns):
        gradient = np.where(free, 0.0, a.T @ (b - a @ x))
        enters = int(gradient.argmax())
        if gradient[enters] <= least:
            break
        free[enters] = True
        while True:
            trial = np.zeros(columns)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            below = free & (trial <= 0)
            if not below.any():
                x = trial
                break
            step = float((x[below] / (x[below] - trial[below])).min())
            x += step * (trial - x)
            free &= x > 1e-15 * np.abs(x).max(initial=0.0)
            x[~free] = 0.0
    result: npt.NDArray[np.float64] = x / norms
    return result
