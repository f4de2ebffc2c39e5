"""What changes when one decision changes: two columns on one workload, operation by operation."""

from spte.diff.run import Change, Difference, First, diff

__all__ = ["Change", "Difference", "First", "diff"]
