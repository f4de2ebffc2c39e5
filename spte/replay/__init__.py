"""Perform a recording's ops on the model."""

from spte.replay.run import replay

__all__ = ["replay"]
