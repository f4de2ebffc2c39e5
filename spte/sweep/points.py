"""What a sweep does: its points, what they need, and a digest that tells it from every other sweep."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spte._version import __version__
from spte.cost import Costs
from spte.cost import load as load_costs
from spte.migrate import migrate
from spte.migrate.settings import DEFAULTS, STRESS, load_trace, plan_of
from spte.trace import Trace

Settings = Mapping[str, Any]
Figures = dict[str, Any]
GO_ON = "run the same command again: with -o it goes on where it stopped"


class SweepError(ValueError):
    """A sweep that can not be done or gone on with; the message holds the value and the way out."""


class SchedulerError(SweepError):
    """There is no Dask scheduler where one was named; it died; it has no worker, or lost those that did a point."""


class WorkerError(SweepError):
    """A process of this host's died."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """Migrations to be done.

    Parameters
    ----------
    points : sequence of mapping
        Settings of each, as `spte.migrate.settings.plan_of` takes them.

    Attributes
    ----------
    traces : dict of str to Trace
        The traces by the names that the points give, read once, here: other hosts need not have the files.
    costs : dict of str to Costs
        The costs likewise.

    Raises
    ------
    SweepError
        If there is no point.
    MigrateError, WorkloadError
        If one can not be done: all are checked before the first is.
    TraceError, CostError
        If a trace or costs can not be read.
    """

    points: Sequence[Settings]
    traces: dict[str, Trace] = dataclasses.field(init=False)
    costs: dict[str, Costs] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if not self.points:
            raise SweepError("a sweep of no point; name an option and its values")
        named_traces = sorted({name_of_trace(point) for point in self.points} - {STRESS})
        named_costs = sorted({str(point["cost"]) for point in self.points if point.get("cost") is not None})
        object.__setattr__(self, "traces", {name: load_trace(name) for name in named_traces})
        object.__setattr__(self, "costs", {name: load_costs(name).costs for name in named_costs})
        for point in self.points:
            trace, costs = self.inputs(point)
            plan_of(point, trace=trace, costs=costs)

    def setting(self, index: int, name: str) -> object:
        """Return a setting of a point, else its default."""
        return self.points[index].get(name, DEFAULTS[name])

    def inputs(self, point: Settings) -> tuple[Trace | None, Costs | None]:
        """Return the trace and the costs of a point."""
        cost = point.get("cost")
        return self.traces.get(name_of_trace(point)), None if cost is None else self.costs[cost]

    @property
    def digest(self) -> str:
        """What tells this sweep from others: its points, what is in its traces and costs, and the version of the package."""
        told = hashlib.sha256(json.dumps([__version__, [dict(point) for point in self.points]], sort_keys=True).encode())
        for name, trace in self.traces.items():
            told.update(name.encode())
            for array in (trace.t_ns, trace.indptr, trace.gfn):
                told.update(array.tobytes())
        told.update(json.dumps({name: dataclasses.asdict(costs) for name, costs in self.costs.items()}, sort_keys=True).encode())
        return told.hexdigest()[:32]


def name_of_trace(point: Settings) -> str:
    """Return what a point names as its trace."""
    return str(point.get("trace", DEFAULTS["trace"]))


def measure(settings: Settings, trace: Trace | None, costs: Costs | None) -> Figures:
    """Do one point and return its figures: `Outcome.figures`."""
    return migrate(plan_of(settings, trace=trace, costs=costs)).figures()
