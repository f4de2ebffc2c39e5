"""Dirty logging over a VM's memslots: enable, disable, GET, CLEAR, reset of rings - KVM's order of steps around the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spte.arrays.context import READONLY, SPTES_WRITTEN, VCPU_KICKS, U64s
from spte.bits import ROLE_GUEST_MODE
from spte.errors import BufferFaultError, ClearRangeError, DirtyRingInUseError, NoDirtyLogError, NoRingIoctlError, RingDisabledError
from spte.host.pages import the_host
from spte.kernels._clear_dirty import clear_dirty_slot
from spte.kernels._collapse import collapse_slot
from spte.kernels._harvest import clear_dirty_log, get_dirty_log
from spte.kernels._split import split_slot
from spte.kernels._write_protect import count_protected, write_protect_slot
from spte.mmu.dirty_log.ring_reset import reset_ring
from spte.mmu.slot.rmap import split_slot_rmaps, zap_collapsible_rmaps
from spte.mmu.slot.set_dirty import set_dirty_slot
from spte.mmu.slot.zap_collapsible import zap_collapsible
from spte.vm.memslots import Memslot
from spte.vm.set_memory_region import check_slot_number

if TYPE_CHECKING:
    from spte.vm.vm import VM


def _write_protect(vm: VM, slot: Memslot, level: int, tdp_level: int) -> int:
    """Write-protect the leaves of `slot` of `level` and above, those of the TDP MMU from `tdp_level` on; returns SPTEs written."""
    t, place = vm.mmu.tables, (slot.as_id, slot.base_gfn, slot.end_gfn)
    rewritten = int(count_protected(t, *place, tdp_level)) if vm.policy.tdp_rewrites else 0
    with vm.mmu.traced():
        return rewritten + int(write_protect_slot(t, *place, level, tdp_level))


def arm_slot(vm: VM, slot: Memslot) -> None:
    """Make the first write to each page of `slot` visible: split, clear dirty or write-protect, flush."""
    t, m, policy = vm.mmu.tables, vm.mmu.mode, vm.policy
    all_set, pml = vm.manual == 3, bool(m.dirty_log_size)
    if slot.flags & READONLY or (all_set and policy.initially_set_enable == "nothing"):
        return
    if m.eager and not all_set:
        if vm.memslots.has_rmaps(slot):
            s, k = vm.memslots.place(slot)
            split_slot_rmaps(t, s, m, k)
        with vm.mmu.traced():
            split_slot(t, m, vm.mmu.roots_of(slot), slot.base_gfn, slot.end_gfn)
    cleared = 0
    if pml and not all_set:
        with vm.mmu.traced():
            cleared = int(clear_dirty_slot(t, m, slot.as_id, slot.base_gfn, slot.end_gfn))
    level = 2 if pml or all_set else 1
    own_routine = pml and not policy.one_write_protect
    protected = _write_protect(vm, slot, level, level if policy.tdp_start_level or own_routine else 1)
    t.meta[SPTES_WRITTEN] += cleared + protected
    if policy.enable_flush == "always":
        vm.mmu.flush()
    else:
        for changed in (cleared, protected):
            if changed:
                vm.mmu.flush()


def collapse(vm: VM, slot: Memslot) -> None:
    """Make huge mappings of `slot` possible again after logging; before patch 12 also set D, to silence PML."""
    t, m = vm.mmu.tables, vm.mmu.mode
    if slot.flags & READONLY:
        return
    s, k = vm.memslots.place(slot)
    if vm.memslots.has_rmaps(slot):
        # The walk took in the rmaps of level 2 later.
        levels = np.int64(1 if vm.policy.collapse == "zap-leaf" else 2)
        if zap_collapsible_rmaps(t, s, the_host(), m, k, levels):
            vm.mmu.flush()
    roots = vm.mmu.roots_of(slot)
    with vm.mmu.traced():
        if vm.policy.collapse == "zap-leaf":
            done = [zap_collapsible(t, s, the_host(), m, k, int(t.role[root]) & ROLE_GUEST_MODE) for root in roots]
        else:
            done = [collapse_slot(t, s, the_host(), m, roots, k)]
    for dropped in done:
        if dropped and not m.flush_each:
            vm.mmu.flush()
    if vm.policy.disable_sets_dirty and m.dirty_log_size:
        with vm.mmu.traced():
            written, flush = set_dirty_slot(t, m, slot.as_id, slot.base_gfn, slot.end_gfn, vm.policy.tdp_rewrites)
        t.meta[SPTES_WRITTEN] += written
        if flush:
            vm.mmu.flush()


def _logging_slot(vm: VM, slot: int) -> Memslot:
    memslot = vm.memslots.find(slot)
    if memslot is None or memslot.bitmap < 0:
        why = "does not log" if memslot else "does not exist"
        raise NoDirtyLogError(f"slot={slot:#x} {why}; set flags=1 (LOG_DIRTY_PAGES) first")
    return memslot


def _refuse_ring(vm: VM) -> None:
    if vm.has_ring:
        raise DirtyRingInUseError("the VM logs to dirty rings; harvest vcpu.ring and call reset_dirty_rings()")


def _check_buffer(array: Any, words: int, name: str, *, write: bool) -> None:
    good = isinstance(array, np.ndarray) and array.dtype == np.uint64 and array.ndim == 1
    if not good or (array.shape[0] != words if write else array.shape[0] < words) or (write and not array.flags.writeable):
        what = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise BufferFaultError(f"{name} is {what}; pass {'a writable' if write else 'an'} array of uint64[{words}]")


def _sync(vm: VM) -> None:
    """Kick the vCPUs out of the guest, so that their PML buffers are drained. Whoever harvests here finds them drained already."""
    if vm.mmu.mode.dirty_log_size or vm.policy.sync_kicks_without_pml:
        vm.mmu.tables.meta[VCPU_KICKS] += len(vm.vcpus)


def get(vm: VM, slot: int, out: U64s | None) -> U64s:
    """KVM_GET_DIRTY_LOG; what is dirty is exchanged, re-armed and flushed before `out` is looked at."""
    _refuse_ring(vm)
    check_slot_number(slot, vm.memslots.user_mem_slots)
    memslot = _logging_slot(vm, slot)
    _sync(vm)
    if vm.manual:
        snapshot = vm.memslots.bitmap(memslot).copy()
    else:
        snapshot = np.zeros(memslot.words, np.uint64)
        s, k = vm.memslots.place(memslot)
        with vm.mmu.traced():
            found, changed = get_dirty_log(vm.mmu.tables, s, vm.mmu.mode, vm.mmu.roots_of(memslot), k, snapshot)
        vm.mmu.tables.meta[SPTES_WRITTEN] += changed
        if found:
            vm.mmu.flush()
    if out is None:
        return snapshot
    _check_buffer(out, memslot.words, "out", write=True)
    out[:] = snapshot
    return out


def clear(vm: VM, slot: int, first_page: int, num_pages: int, bitmap: U64s) -> None:
    """KVM_CLEAR_DIRTY_LOG; all is checked before anything changes."""
    _refuse_ring(vm)
    check_slot_number(slot, vm.memslots.user_mem_slots)
    if first_page % 64 or first_page < 0:
        raise ClearRangeError(f"first_page={first_page} is not a multiple of 64; round down to {max(first_page & ~63, 0)}")
    memslot = _logging_slot(vm, slot)
    left = memslot.npages - first_page
    if left < 0 or not 0 <= num_pages <= left or (num_pages < left and num_pages % 64):
        raise ClearRangeError(
            f"first_page={first_page}, num_pages={num_pages} of a slot of {memslot.npages} pages; take a multiple of 64, or up to the end"
        )
    words = (num_pages + 63) // 64
    _check_buffer(bitmap, words, "bitmap", write=False)
    _sync(vm)
    wanted = vm.memslots.scratch(memslot)[:words]
    wanted[:] = bitmap[:words]
    s, k = vm.memslots.place(memslot)
    with vm.mmu.traced():
        found, changed = clear_dirty_log(vm.mmu.tables, s, vm.mmu.mode, vm.mmu.roots_of(memslot), k, np.int64(first_page >> 6), wanted)
    vm.mmu.tables.meta[SPTES_WRITTEN] += changed
    if found:
        vm.mmu.flush()


def reset_rings(vm: VM) -> int:
    """KVM_RESET_DIRTY_RINGS: free the harvested entries of every ring and re-arm their pages; returns entries freed."""
    if not vm.policy.dirty_ring:
        raise NoRingIoctlError(f"policy {vm.policy.name} has no dirty rings; harvest by get_dirty_log()")
    if not vm.has_ring:
        raise RingDisabledError("the VM has no dirty rings; pass ring_bytes when making it")
    freed = 0
    for vcpu in vm.vcpus:
        with vm.mmu.traced():
            got, changed = reset_ring(vm.mmu.tables, vm.memslots.spaces[0], vm.mmu.mode, vcpu.arrays, vm.mmu.roots(0))
        vm.mmu.log.ring_reset(vcpu.index, vcpu.arrays)
        vm.mmu.tables.meta[SPTES_WRITTEN] += changed
        freed += got
    if freed:
        vm.mmu.flush()
    return int(freed)
