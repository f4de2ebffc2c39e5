"""Many migrations: all combinations of settings, on this host's cores or a Dask cluster, kept as they finish."""

from spte.sweep.journal import Journal
from spte.sweep.points import Sweep, SweepError
from spte.sweep.recommend import recommend
from spte.sweep.run import sweep

__all__ = ["Journal", "Sweep", "SweepError", "recommend", "sweep"]
