"""KVM's x86 dirty logging as arrays: memslots, vCPUs, page tables and dirty logs without the hardware."""

from spte import kernels, policy
from spte._version import __version__
from spte.access import EXEC, READ, WRITE, Access
from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.errors import DirtyLoggingLeak, InvariantError, KernelWarning, KvmError
from spte.exits import Exit
from spte.guest_tables import GuestTables
from spte.host.backing import Backing
from spte.platform import Platform
from spte.policy import Policy
from spte.vm.vm import VM

__all__ = [
    "EXEC",
    "LOG_DIRTY_PAGES",
    "READ",
    "READONLY",
    "VM",
    "WRITE",
    "Access",
    "Backing",
    "DirtyLoggingLeak",
    "Exit",
    "GuestTables",
    "InvariantError",
    "KernelWarning",
    "KvmError",
    "Platform",
    "Policy",
    "__version__",
    "kernels",
    "policy",
]
