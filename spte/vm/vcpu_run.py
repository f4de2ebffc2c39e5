"""Into the guest and out of it: a run of accesses until it stops, alone or beside others; the kick that an ioctl begins with."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from spte._arguments import as_array, spell
from spte.access import Access
from spte.arrays.mode import replace
from spte.arrays.records import I64s
from spte.arrays.vcpu import (
    DONE,
    EXEC,
    EXIT_EFAULT,
    EXIT_EXCLUSIVE,
    EXIT_GUEST_FAULT,
    EXIT_GUEST_PML_FULL,
    EXIT_HOST,
    EXIT_INTERNAL,
    EXIT_LOG,
    EXIT_MMIO,
    EXIT_NEEDBREAK,
    EXIT_NOMEM,
    EXIT_RING_FULL,
    EXIT_ROOT,
    NO_ENTRY,
    NO_EXIT,
    READ,
    STAMP,
    STAMP_STEP,
    WRITE,
    Vcpu,
)
from spte.bits import GUEST_EPT, GUEST_EPT_NO_AD, GUEST_LONG, PFN_MASK, WRITABLE, is_leaf
from spte.cpu.run import run as run_guest
from spte.cpu.run import run_shadow
from spte.cpu.run_shared import run_shared, top_up
from spte.errors import OutOfTablesError, SlotRangeError
from spte.exits import Exit
from spte.host.pages import the_host
from spte.mmu.walk import walk
from spte.platform import EPT
from spte.vm.kvm import Kvm, KvmVcpu

Kinds = npt.NDArray[np.uint8]
PAGED_BITS = 48  # what four levels of guest tables reach
ONE_KIND = {kind: np.array([kind], np.uint8) for kind in (READ, WRITE, EXEC)}
GOES_ON = "needbreak"  # why a run ends that goes on beside others
TOGETHER = 64  # accesses done while a run has the VM for itself
ROWS = 64  # that a run beside others takes from the arena at once
_NO_GFNS = np.zeros(0, np.int64)
_INT64 = np.dtype(np.int64)
_REASONS = {
    EXIT_RING_FULL: "dirty_ring_full", EXIT_MMIO: "mmio", EXIT_EFAULT: "efault", EXIT_GUEST_FAULT: "page_fault",
    EXIT_GUEST_PML_FULL: "pml_full", EXIT_INTERNAL: "internal_error",
}  # fmt: skip


def kick(kvm: Kvm) -> None:
    """Let every vCPU leave the guest, as an ioctl finds them; ClosedError if the VM was closed."""
    kvm.check_alive()
    if kvm.vcpus_in_guest:
        for vcpu in kvm.vcpus:
            leave_guest(kvm, vcpu)


class Ioctl:
    """Hold the VM's lock, every vCPU out of the guest: what a call does once its arguments are checked.

    Parameters
    ----------
    kvm : Kvm
        The VM.
    """

    __slots__ = ("_kvm",)

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm

    def __enter__(self) -> bool:
        """Return whether vCPUs run meanwhile: False."""
        kvm = self._kvm
        kvm.exclusive.__enter__()
        try:
            kick(kvm)
        except BaseException:
            kvm.exclusive.__exit__(None, None, None)
            raise
        return False

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._kvm.exclusive.__exit__(kind, value, trace)
        if kind is None:
            self._kvm.give_warnings(stacklevel=3)


def leave_guest(kvm: Kvm, vcpu: KvmVcpu) -> None:
    """Leave the guest, if the last run has not: an exit, which drains the PML buffer."""
    if vcpu.in_guest:
        vcpu_run(kvm, vcpu, _NO_GFNS, ONE_KIND[READ])


def _set_in_guest(kvm: Kvm, vcpu: KvmVcpu, value: bool) -> None:
    kvm.vcpus_in_guest += value - vcpu.in_guest
    vcpu.in_guest = value


def enter_guest(kvm: Kvm, vcpu: KvmVcpu) -> None:
    """Before a guest entry take over the PML control and load a valid root: vcpu_enter_guest.

    While the vCPU runs L2, a new PML control waits for L1.
    """
    kvm.check_alive()
    mmu = vcpu.mmu
    if mmu.loaded == kvm.mmu.generation and not vcpu.update_requested:
        return
    if vcpu.update_requested:
        vcpu.update_requested = False
        vcpu.nested.update_deferred |= vcpu.in_l2
        if not vcpu.in_l2:
            vcpu.pml01 = kvm.pml_wanted
    _take_mode(kvm, vcpu)
    kvm.mmu.load(mmu, vcpu.arrays)
    if vcpu.sync_requested:
        vcpu.sync_requested = False
        kvm.mmu.sync(mmu, vcpu.arrays)
    # Pages of the shadow MMU are zapped at any time, roots of the TDP MMU only where the generation moves on.
    mmu.loaded = -1 if kvm.mmu.has_shadow_pages else kvm.mmu.generation


def _take_mode(kvm: Kvm, vcpu: KvmVcpu) -> None:
    """Bring what kernels know of the vCPU in step with what it runs."""
    base, l2 = kvm.mmu.mode, vcpu.nested.l2
    if l2 is None:
        vcpu.mmu.mode = base
    elif kvm.platform.paging == EPT:
        gpte = GUEST_EPT if l2.ad else GUEST_EPT_NO_AD
        # Without L1's EPT, KVM turns A/D bits off for L2 on a root whose entries say that they are on.
        vcpu.mmu.mode = replace(base, hw_ad=np.int64(l2.ept is not None and l2.ad), gpte=gpte)
    else:
        vcpu.mmu.mode = replace(base, gpte=GUEST_LONG)
    pml_in_l2 = kvm.policy.pml_in_l2
    vcpu.arrays.vcpu[0].pml_enabled = vcpu.pml01 and (l2 is None or pml_in_l2)
    vcpu.arrays.vcpu[0].pml_barred = l2 is not None and not pml_in_l2


def integers(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """Return what is array-like as an array of integers in one dimension, of objects if some do not fit 64 bits; else TypeError."""
    array = as_array(values, name)
    if array.ndim != 1 or not (array.dtype.kind in "iu" or not array.size or _are_large(array)):
        dtype = "object" if array.dtype.hasobject else spell(array.dtype)
        raise TypeError(f"{name} has dtype {dtype} and shape {array.shape}; pass a one-dimensional array of integers")
    return array


def _are_large(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind == "O" and all(isinstance(n, int) for n in array) and not all(-1 << 63 <= n < 1 << 64 for n in array)


def frames(gfns: npt.ArrayLike) -> tuple[I64s, int, int]:
    """Return guest frame numbers as the kernels take them, their lowest and their highest."""
    array = integers(gfns, "gfns")
    size = array.size
    if size == 0:
        return _NO_GFNS, 0, 0
    if array.dtype.kind == "O":
        bad = next(gfn for gfn in array if not -1 << 63 <= gfn < 1 << 64)
        raise SlotRangeError(f"gfns holds {spell(bad)}, outside of what the guest can address")
    low, high = (int(array.min()), int(array.max())) if size > 1 else (array.item(),) * 2
    if array.dtype != _INT64:
        array = array.view(np.int64) if array.dtype == np.uint64 else array.astype(np.int64)
    if not array.flags.carray:
        array = array.copy()  # contiguous and writable: one type for the kernels
    return array, low, high


def check_reach(kvm: Kvm, vcpu: KvmVcpu, low: int, high: int) -> None:
    """Refuse gfns from `low` to `high` if the running guest can not address them."""
    bits = PAGED_BITS if vcpu.cr3 is not None or vcpu.nested.l2 is not None else kvm.platform.reach_bits
    if low < 0 or high >> (bits - 12):
        bad = low if low < 0 else high
        raise SlotRangeError(f"gfn {bad:#x} is outside the {bits} bits that the guest can address")


def vcpu_run(kvm: Kvm, vcpu: KvmVcpu, gfns: I64s, kinds: Kinds, *, leave: bool = True, yields: bool = False) -> Exit | None:
    """Access each of `gfns` in order until one stops the run: KVM_RUN. Not `leave`: the guest is not left after the last.

    When another thread waits, it is let in between two accesses. The guest is not left for it, but by the other's kick. With `yields`
    the run ends then, for the reason GOES_ON, if the rest can run beside others.
    """
    at, mmu, reason = 0, kvm.mmu, EXIT_NEEDBREAK
    while True:
        if reason == EXIT_NEEDBREAK:
            v, no_entry = vcpu.arrays, vcpu.in_guest
            v.vcpu["run_flags"][0] = (0 if leave else NO_EXIT) | (NO_ENTRY if no_entry else 0)
            if not no_entry or mmu.is_invalid(int(v.vcpu["root"][0])):
                enter_guest(kvm, vcpu)
            if no_entry:
                _set_in_guest(kvm, vcpu, False)
            run = run_shadow if mmu.has_shadow_pages else run_guest
        before, at = at, run(mmu.tables, kvm.memslots.spaces[vcpu.as_id], the_host(), v, vcpu.mmu.mode, gfns, kinds, at)
        if v.memory.size:
            _stamp(v, gfns[before:at], kinds[before:at] if len(kinds) > 1 else kinds)
        if mmu.log.on:
            mmu.log.collect(vcpu.index, v)
        reason = int(v.vcpu["exit_reason"][0])
        if reason == DONE:
            if not leave:
                _set_in_guest(kvm, vcpu, True)
            return None
        if reason == EXIT_HOST:
            _copy_page(kvm, vcpu, int(v.vcpu[0].exit_gfn))
        elif reason == EXIT_NOMEM:
            raise OutOfTablesError(f"no page-table page left for gfn {v.vcpu[0].exit_gfn:#x}; delete slots or close the VM")
        elif reason == EXIT_ROOT:
            mmu.load(vcpu.mmu, v)
        elif reason not in (EXIT_LOG, EXIT_NEEDBREAK):
            return _exit_of(_REASONS[reason], int(at), gfns, kinds)
        if reason == EXIT_NEEDBREAK or kvm.exclusive.contended:
            if reason in (EXIT_LOG, EXIT_NEEDBREAK):
                _set_in_guest(kvm, vcpu, True)
            if yields and reason == EXIT_NEEDBREAK and _is_served_beside(kvm, vcpu):
                leave_guest(kvm, vcpu)
                return _exit_of(GOES_ON, int(at), gfns, kinds)
            kvm.exclusive.let_in()
            reason = EXIT_NEEDBREAK


def _exit_of(reason: str, at: int, gfns: I64s, kinds: Kinds) -> Exit:
    kind = int(kinds[at] if len(kinds) > 1 and at < len(kinds) else kinds[0]) if len(kinds) else READ
    return Exit(reason, at, int(gfns[at]) if at < len(gfns) else -1, Access(kind))


def _stamp(v: Vcpu, gfns: I64s, kinds: Kinds) -> None:
    """Store in the memory that is kept what `run_shared` stores by itself."""
    written = gfns[kinds == WRITE] if len(kinds) > 1 else gfns[: len(gfns) if kinds[0] == WRITE else 0]
    v.memory[written] = v.requests[STAMP] + STAMP_STEP * np.arange(1, len(written) + 1)
    v.requests[STAMP] += STAMP_STEP * len(written)


def run_beside(kvm: Kvm, vcpu: KvmVcpu, gfns: I64s, kinds: Kinds) -> tuple[int, Exit | None]:
    """As `vcpu_run`, beside other vCPUs and harvests, without the VM's lock: returns how many accesses were done, and the exit.

    It ends early, without an exit, where the vCPU is not one that runs beside others.
    """
    at, v = 0, vcpu.arrays
    while at < len(gfns):
        with kvm.exclusive.shared():
            if vcpu.in_guest or not _is_served_beside(kvm, vcpu):
                break
            reason = EXIT_EXCLUSIVE
            if vcpu.mmu.loaded == kvm.mmu.generation and not vcpu.update_requested:
                t, s = vcpu.beside(kvm)
                at = int(run_shared(t, s, the_host(), v, vcpu.mmu.mode, gfns, kinds, at))
                kvm.count(t.kvm)
                reason = int(v.vcpu["exit_reason"][0])
        if reason == EXIT_EXCLUSIVE:
            end = min(at + TOGETHER, len(gfns))
            with kvm.exclusive:
                stop = vcpu_run(kvm, vcpu, gfns[at:end], kinds[at:end] if len(kinds) > 1 else kinds)
                if (own := vcpu.beside(kvm)[0].kvm)["free_row"][0] == 0:
                    top_up(kvm.mmu.tables, own, ROWS)
            if stop is not None:
                return at, _exit_of(stop.reason, at + stop.index, gfns, kinds)
            at = end
        elif reason not in (DONE, EXIT_NEEDBREAK):
            return at, _exit_of(_REASONS[reason], at, gfns, kinds)
    return at, None


def _is_served_beside(kvm: Kvm, vcpu: KvmVcpu) -> bool:
    """Tell whether the TDP MMU serves all that the vCPU does, and nothing looks at single accesses."""
    apart = kvm.mmu.has_shadow_pages or vcpu.in_l2 or vcpu.smm is not None  # or on memslots that `beside` does not give
    return not (kvm.closed or apart or kvm.mmu.log.on)


def _copy_page(kvm: Kvm, vcpu: KvmVcpu, gfn: int) -> None:
    """Let the host copy the zero page under `gfn`; its notifier makes KVM let the guest fault again, SPTE or not."""
    reg = vcpu.arrays.vcpu[0]
    _host_write(kvm, vcpu, gfn if reg.pgd < 0 else int(reg.walker.gfn))


def _host_write(kvm: Kvm, vcpu: KvmVcpu, gfn: int) -> int:
    """Make the host map page `gfn` of the vCPU writable; returns the host page."""
    slot = kvm.memslots.at(gfn, vcpu.as_id)
    assert slot is not None
    hpage = slot.hpage_of(gfn)
    kvm.host_write(hpage)
    return hpage


def written_page(kvm: Kvm, vcpu: KvmVcpu, gfn: int) -> int:
    """Return the host page of a page that the guest has just written."""
    t, v = kvm.mmu.tables, vcpu.arrays
    row, i, level = walk(t, v.vcpu[0].root, np.int64(gfn))
    spte = t.sptes[row, i]
    if is_leaf(spte, level) and spte & WRITABLE:
        return (int(spte & PFN_MASK) >> 12) + (gfn & ((1 << (9 * (int(level) - 1))) - 1))
    return _host_write(kvm, vcpu, gfn if v.vcpu[0].pgd < 0 else int(v.vcpu[0].walker.gfn))  # KVM did the write itself
