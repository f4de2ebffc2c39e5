"""What counts cost: nanoseconds per item with their sources, and estimates of guest stall, VMM time and mmu_lock from exact counts."""

from spte.cost.costs import CostError, CostProfile, Costs, Origin
from spte.cost.estimate import CallTime, Stall, VmShape, call_time, guest_stall
from spte.cost.files import dump, load, names

__all__ = [
    "CallTime", "CostError", "CostProfile", "Costs", "Origin", "Stall", "VmShape", "call_time", "dump", "guest_stall", "load", "names",
]  # fmt: skip
