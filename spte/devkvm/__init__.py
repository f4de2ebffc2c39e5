"""The host's own KVM beside the model: the ops of a recording by raw ioctls on /dev/kvm, the guest's accesses by a tiny guest."""

from spte.devkvm.compare import Report, compare
from spte.devkvm.device import IoctlError, NoKvmError
from spte.devkvm.host import Host, host
from spte.devkvm.machine import HostMachine
from spte.devkvm.scenarios import interface

__all__ = ["Host", "HostMachine", "IoctlError", "NoKvmError", "Report", "compare", "host", "interface"]
