"""What a vCPU keeps of the modes that its guest turns on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class L2:
    """What L1 told the CPU of its guest; see `VirtualCpu.enter_l2`."""

    ept: int | None
    ad: bool
    pml: int | None
    vmcb: int | None


@dataclass(slots=True)
class NestedState:
    """What a vCPU keeps for its L2: KVM's struct nested_vmx or nested_svm."""

    l2: L2 | None = None  # None: the vCPU runs L1
    ran: bool = False  # L2 ran once, so that vmcs02 has its controls
    update_deferred: bool = False  # the PML control of L1 changed while L2 ran: update_vmcs01_cpu_dirty_logging


class Interrupted(NamedTuple):
    """What a vCPU goes back to at the end of system management mode."""

    cr3: int | None
    long_mode: bool
