"""Recordings of real KVM compared with the model, op by op."""

from spte.check.run import check, check_all

__all__ = ["check", "check_all"]
