"""Costs fitted on published times: least squares of the relative errors, no cost below 0, all other costs as they are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.cost import CostProfile, Costs, Origin
from spte.cost.costs import ITEMS
from spte.papers.model import seconds, slowest
from spte.papers.published import Experiment, Run
from spte.profile.report import Row

FITTED = (
    "fast_fault", "slow_fault_shared", "shared_contention", "split", "pml_log", "bitmap_word", "mask_walk", "clear_page", "walk_2d",
)  # fmt: skip
"""What enabling, touching and clearing under the TDP MMU tells; nothing in F1 and F3 tells of the other costs."""
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


def fit(measured: Sequence[Measured], known: CostProfile, name: str, experiments: Sequence[Experiment]) -> CostProfile:
    """Return `known` with the costs `FITTED` such that the estimates come nearest to what was measured.

    Parameters
    ----------
    measured : sequence of Measured
        The times to fit. Their estimates must be linear in the costs, as they are under a shared mmu_lock.
    known : CostProfile
        Where all other costs are taken from.
    name : str
        Name of the profile returned.
    experiments : sequence of Experiment
        Where the times are from: origin of the fitted costs.

    Returns
    -------
    CostProfile
        The band of a fitted cost spans the relative errors of the times that tell of it.
    """
    published = np.array([each.published for each in measured])
    unit = {item: dataclasses.replace(_nothing(), **{item: 1.0}) for item in ITEMS}
    vcpus = [slowest(each.row, each.phase, known.costs) for each in measured]  # one and the same for all costs: then they add up
    parts = np.array([[seconds(*each, unit[item], vcpu) for item in ITEMS] for each, vcpu in zip(measured, vcpus, strict=True)])
    parts /= published[:, None]
    fitted = [ITEM_INDEX[item] for item in FITTED]
    values = np.array([getattr(known.costs, item) for item in ITEMS], np.float64)
    values[fitted] = 0.0
    values[fitted] = nonnegative_least_squares(parts[:, fitted], 1.0 - parts @ values)
    shares = parts * values
    estimated = shares.sum(1)
    source = "least squares by spte papers on " + "; ".join(f"{each.name}: {each.source}" for each in experiments)
    machines = ", ".join(dict.fromkeys(each.machine for each in experiments))
    origin = Origin(source, max(each.date for each in experiments), f"{machines}, up to {max(m.row.vcpus for m in measured)} vCPUs")
    new: list[dict[str, float]] = [{}, {}, {}]
    for item in FITTED:
        i = ITEM_INDEX[item]
        telling = shares[:, i] >= COUNTS * estimated
        factors = [1.0, *(1.0 / estimated[telling])]  # published over estimated
        for column, factor in zip(new, (1.0, min(factors), max(factors)), strict=True):
            column[item] = float(values[i] * factor)
    columns = zip((known.costs, known.low, known.high), new, strict=True)
    costs, low, high = (dataclasses.replace(old, **changed) for old, changed in columns)
    title = f"{machines} machine of {' and '.join(each.name for each in experiments)}: fitted by spte papers, the rest as in {known.name}"
    return CostProfile(name, title, costs, low, high, {**known.origins, **dict.fromkeys(FITTED, origin)})


ITEM_INDEX = {item: i for i, item in enumerate(ITEMS)}


def _nothing() -> Costs:
    return Costs(**dict.fromkeys(ITEMS, 0.0))


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
