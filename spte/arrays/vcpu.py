"""One vCPU: its record, PML buffer, dirty ring and event log; how a guest accesses memory and why it stops."""

from __future__ import annotations

from typing import NamedTuple

from spte._numba.jit import PREFETCHES
from spte.access import Access
from spte.arrays.records import I64s, Records, U64s, columns, record

READ, WRITE, EXEC = (int(kind) for kind in Access)  # kinds of guest access
WALKS_AHEAD = PREFETCHES  # accesses of a block
# Why a run in the guest ends.
DONE, EXIT_RING_FULL, EXIT_MMIO, EXIT_HOST, EXIT_EFAULT, EXIT_NOMEM, EXIT_LOG = 0, 1, 2, 3, 4, 5, 6
EXIT_GUEST_FAULT, EXIT_GUEST_PML_FULL = 7, 8  # the guest's own tables do not allow the access; L1's PML buffer is full
EXIT_SHADOW, EMULATED, EXIT_ROOT = 9, 10, 11  # a fault for the shadow MMU; KVM did the access itself; the root was zapped
EXIT_INTERNAL = 12  # KVM gives up
EXIT_NEEDBREAK = 13  # another thread waits for the VM
EXIT_EXCLUSIVE = 14  # a run beside others needs the VM for itself
# Words of Vcpu.requests.
REQUEST, CONFIRMED = 0, 1  # counted up by who wants the vCPU to exit once; the request after which it last did
IN_GUEST = 2  # 1: a run beside others is in a kernel: vcpu->mode
NEEDBREAK = 3  # 1: another thread waits for the VM
STAMP = 4  # what the last write stored in `memory`; its low byte is the vCPU's number
REQUESTS, STAMP_STEP = 8, 256
# Flags of a run: the guest was not left before it; it is not left at its end.
NO_ENTRY, NO_EXIT = 1, 2
PIECE = 1 << 16  # accesses after which a run looks whether another thread waits, some ms at most
# Events in Vcpu.log: kind and up to five values.
LOG_COLUMNS = 6
EV_FAULT, EV_FAST, EV_SET, EV_SPTE, EV_MARK, EV_PML, EV_PML_FULL, EV_PUSH, EV_RING_EXIT, EV_MMIO = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10

# The last walk of guest page tables: level and gfn that it came to, access allowed there; table and access on the way by level.
GUEST_WALKER = record("guest_walker", [
    *columns("i8", "level", "gfn", "pte_access"), ("table_gfn", "i8", (5,)), ("pt_access", "i8", (5,)),
])  # fmt: skip

KVM_VCPU = record("kvm_vcpu", [
    ("root", "i8"),  # row of the root that it runs on
    ("pgd", "i8"),  # gfn of the guest's root table if KVM shadows it, else -1
    *columns("i8", "pml_enabled", "pml_index"),
    ("pml_barred", "i8"),  # L2 runs with PML off: a full buffer is an exit that must not happen
    *columns("i8", "l1_pml_gfn", "l1_pml_index"),  # L1's own PML buffer while L2 runs with it, else -1; its index
    *columns("i8", "ring_size", "dirty_index", "reset_index", "soft_limit"),  # struct kvm_dirty_ring
    ("ring_soft_full", "i8"),  # KVM_REQ_DIRTY_RING_SOFT_FULL
    *columns("i8", "exit_reason", "exit_gfn"),
    ("run_flags", "i8"),
    ("store_offset", "i8"),  # bytes into the page of a write
    *columns("i8", "ahead", "prefetched"),  # accesses up to which none is walked ahead, and whose faults' lines were prefetched
    *columns("i8", "piece", "due"),  # accesses between two looks at `needbreak`; the one before which the next is due
    ("logged", "i8"),  # events in the log
    *columns("i8", "pf_taken", "pf_fixed", "pf_fast", "pf_emulate", "pf_spurious", "pf_mmio_spte_created", "exits"),
    *columns("i8", "pml_entries", "pml_fulls", "ring_fulls", "slow_faults", "violations", "misconfigs"),
    ("walker", GUEST_WALKER),
])  # fmt: skip


class Vcpu(NamedTuple):
    """One vCPU."""

    vcpu: Records  # [1] KVM_VCPU
    pml: U64s  # [512]
    ring: U64s  # [entries, 2]: flags | slot << 32, offset
    log: U64s  # [n, LOG_COLUMNS]; n == 0: nothing is recorded
    walked: U64s  # places of the entries where the walks of the next accesses ended
    requests: I64s  # [REQUESTS] for runs beside others: vcpu->requests, vcpu->mode
    memory: U64s  # [gfns] what was last written to each page, kept by runs beside others; empty: nothing is kept
