"""What was published: experiments with dirty_log_perf_test, their runs, and the seconds of each phase."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent.parent / "data" / "papers.toml"
FIT, PREDICTION, REPORTED = "fit", "prediction", "reported"


class PapersError(ValueError):
    """An experiment that there is not; the message lists what there is."""


class Run(NamedTuple):
    """One run of dirty_log_perf_test.

    Parameters
    ----------
    label : str
        What it is, unique in its experiment.
    platform, policy : str
        What stands for its machine and kernel here.
    options : mapping of str to object
        Parameters of `spte.profile.perf_test.PerfTest`; the others have the selftest's defaults.
    seconds : mapping of str to float
        Published seconds by phase: ``"enable"``, ``"disable"``, or a kind and its iteration, ``"dirty 1"``.
    unpredicted : mapping of str to float
        Those of phases that no cost is for: they are shown, and not estimated.
    counts : mapping of str to int
        Published counts: `flushes` while disabling, `faults` of the whole run.
    before : str or None
        Label of the run that this one is compared with.
    """

    label: str
    platform: str
    policy: str
    options: Mapping[str, Any]
    seconds: Mapping[str, float]
    unpredicted: Mapping[str, float]
    counts: Mapping[str, int]
    before: str | None

    @property
    def iterations(self) -> int:
        """The iterations that the phases need."""
        return max([int(phase.split()[1]) for phase in self.seconds if " " in phase], default=2)


class Experiment(NamedTuple):
    """A published experiment.

    Parameters
    ----------
    name, title, source, date, machine : str
        What it is, who published it where and when, and what it was measured on.
    role : str
        ``"fit"``: costs are fitted on it; ``"prediction"``: its times are predicted and judged; ``"reported"``: predicted, not judged.
    missing : tuple of str
        What the model can not predict of it, a line each.
    runs : tuple of Run
        What was run.
    """

    name: str
    title: str
    source: str
    date: str
    machine: str
    role: str
    missing: tuple[str, ...]
    runs: tuple[Run, ...]


@cache
def _all() -> tuple[Experiment, ...]:
    found = []
    for name, told in tomllib.loads(FILE.read_text("utf-8")).items():
        runs = tuple(Run(**{"unpredicted": {}, "counts": {}, "before": None, **run}) for run in told.pop("run"))
        found.append(Experiment(name, **{**told, "missing": tuple(told["missing"])}, runs=runs))
    return tuple(found)


def experiments(*names: str) -> tuple[Experiment, ...]:
    """Return the experiments of those names in their order, or all; PapersError if there is no such experiment."""
    known = [each.name for each in _all()]
    for name in names:
        if name not in known:
            raise PapersError(f"experiment {name!r} is not known; take one of {', '.join(known)}")
    return tuple(each for each in _all() if not names or each.name in names)
