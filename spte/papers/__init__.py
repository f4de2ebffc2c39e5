"""Published experiments, run again on the model at their real sizes: what was published beside what counts and costs estimate."""

from spte.papers.compare import Comparison, compare
from spte.papers.fit import FITTED, fit
from spte.papers.model import perform
from spte.papers.published import Experiment, PapersError, Run, experiments

__all__ = ["FITTED", "Comparison", "Experiment", "PapersError", "Run", "compare", "experiments", "fit", "perform"]
