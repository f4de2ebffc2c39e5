"""Published against estimated, phase by phase, before against after, and whether a prediction holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spte.cost import Costs
from spte.papers.model import counted, seconds
from spte.papers.published import PREDICTION, Experiment
from spte.profile.report import Row

HOLDS = 2.0
"""An estimate within this factor of what was published holds."""


class Line(NamedTuple):
    """One published time or count.

    Parameters
    ----------
    run, what : str
        Label of the run; the phase, or the name of the count.
    published, estimated : float
        s, or a count of the model's, which is exact.
    to_before : tuple of float or None
        The ratio to the run before, published and estimated.
    ns_a_page : float or None
        Of a time, what is left, published less estimated, for each 4 KiB page of the guest, ns.
    """

    run: str
    what: str
    published: float
    estimated: float
    to_before: tuple[float, float] | None
    ns_a_page: float | None

    @property
    def factor(self) -> float:
        """Estimated over published."""
        return self.estimated / self.published

    @property
    def holds(self) -> bool:
        """Whether the estimate is within `HOLDS` of what was published."""
        return 1 / HOLDS <= self.factor <= HOLDS


class Comparison(NamedTuple):
    """An experiment, published against estimated.

    Parameters
    ----------
    experiment : Experiment
        What was published.
    lines : tuple of Line
        Times, in their order.
    counts : tuple of Line
        Counts, exact.
    """

    experiment: Experiment
    lines: tuple[Line, ...]
    counts: tuple[Line, ...]

    @property
    def held(self) -> int:
        """How many of the times hold."""
        return sum(line.holds for line in self.lines)

    @property
    def typical(self) -> float:
        """Typical error: the geometric mean of the factors by which estimates are off, 1 or more."""
        return math.exp(sum(abs(math.log(line.factor)) for line in self.lines) / len(self.lines))

    @property
    def holds(self) -> bool | None:
        """Whether the typical error is within `HOLDS`; None if the experiment is not judged."""
        return self.typical <= HOLDS if self.experiment.role == PREDICTION else None


def compare(experiment: Experiment, rows: Mapping[str, Row], costs: Costs) -> Comparison:
    """Return `experiment` beside what `rows`, by the labels of its runs, take at `costs`."""
    return Comparison(experiment, tuple(_times(experiment, rows, costs)), tuple(_counts(experiment, rows)))


def _times(experiment: Experiment, rows: Mapping[str, Row], costs: Costs) -> Iterator[Line]:
    done: dict[tuple[str, str], tuple[float, float]] = {}
    for run in experiment.runs:
        row = rows[run.label]
        for phase, published in run.seconds.items():
            estimated = seconds(run, row, phase, costs)
            done[run.label, phase] = published, estimated
            left = (published - estimated) * 1e9 / row.npages
            yield Line(run.label, phase, published, estimated, _ratio(done, run.before, phase, published, estimated), left)


def _counts(experiment: Experiment, rows: Mapping[str, Row]) -> Iterator[Line]:
    done: dict[tuple[str, str], tuple[float, float]] = {}
    for run in experiment.runs:
        if run.counts:
            model = counted(rows[run.label])
            for name, published in run.counts.items():
                done[run.label, name] = published, model[name]
                ratio = _ratio(done, run.before, name, published, model[name])
                yield Line(run.label, name, published, model[name], ratio, None)


def _ratio(
    done: Mapping[tuple[str, str], tuple[float, float]], before: str | None, what: str, published: float, estimated: float
) -> tuple[float, float] | None:
    if before is None or (before, what) not in done:
        return None
    old_published, old_estimated = done[before, what]
    return published / old_published, estimated / old_estimated


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Return in one line how many of the predictions hold."""
    judged = [each for each in comparisons if each.holds is not None]
    held = [each.experiment.name for each in judged if each.holds]
    missed = [each.experiment.name for each in judged if not each.holds]
    told = f"{len(held)} of {len(judged)} predictions hold within a factor of {HOLDS:.0f}: {', '.join(held) or 'none'}"
    return told + (f"; {', '.join(missed)} not" if missed else "")
