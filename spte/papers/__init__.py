"""Published experiments, run again on the model at their real sizes: what was published beside what counts and costs estimate."""

from spte.papers.compare import Comparison, compare
from spte.papers.fit import MACHINES, fit, measured
from spte.papers.model import perform
from spte.papers.published import Experiment, PapersError, Run, experiments

__all__ = ["MACHINES", "Comparison", "Experiment", "PapersError", "Run", "compare", "experiments", "fit", "measured", "perform"]
