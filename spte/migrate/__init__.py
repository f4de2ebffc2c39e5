"""Pre-copy live migration on the model: whether it converges, how long it takes, and whether every page arrives."""

from spte.migrate.plan import MigrateError, Plan
from spte.migrate.precopy import migrate
from spte.migrate.report import Outcome, Round

__all__ = ["MigrateError", "Outcome", "Plan", "Round", "migrate"]
