"""What stops a run of guest accesses."""

from __future__ import annotations

from dataclasses import dataclass

from spte.access import NO_ACCESS, Access


@dataclass(frozen=True, slots=True)
class Exit:
    """Why a batch stopped before its end.

    Parameters
    ----------
    reason : str
        ``dirty_ring_full``, ``mmio`` (no slot, or a write to a READONLY one) or ``efault`` (the host refuses the page);
        ``page_fault``: the guest's own page tables do not allow it; ``internal_error``: KVM gives up. What L1 gets to see of L2:
        ``ept_violation`` or ``npf`` (L1's tables for L2 do not allow it), ``pml_full`` (L1's own PML buffer); L1 then runs again.
    index : int
        Position in the batch of the access that is not finished; earlier ones are. After ``mmio`` the access was userspace's: go on
        with ``index + 1``; else run ``gfns[index:]`` again.
    gfn : int
        Its gfn; -1 if the ring was full before the last access returned to the guest.
    kind : Access
        READ, WRITE or EXEC.
    allows : Access
        What the guest's table entry allows where that is the reason; 0 if it is absent.
    """

    reason: str
    index: int
    gfn: int
    kind: Access
    allows: Access = NO_ACCESS
