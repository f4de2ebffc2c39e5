"""What dirty logging costs for the writes of a workload."""

from spte.profile.run import profile

__all__ = ["profile"]
