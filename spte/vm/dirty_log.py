"""Dirty logging of memslots: enable, disable, GET, CLEAR, reset of rings. KVM's order of steps around the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from spte._arguments import spell
from spte.arrays.records import U64s
from spte.arrays.slots import READONLY
from spte.bits import ROLE_GUEST_MODE
from spte.errors import BufferFaultError, ClearRangeError, DirtyRingInUseError, NoDirtyLogError, NoRingIoctlError, RingDisabledError
from spte.host.pages import the_host
from spte.mmu.dirty_log.harvest import clear_dirty_log, clear_dirty_log_shared, get_dirty_log, get_dirty_log_shared
from spte.mmu.dirty_log.ring_reset import reset_ring, reset_ring_shared
from spte.mmu.slot.clear_dirty import clear_dirty_slot
from spte.mmu.slot.collapse import collapse_slot, zap_collapsible
from spte.mmu.slot.rmap import split_slot_rmaps, zap_collapsible_rmaps
from spte.mmu.slot.set_dirty import set_dirty_slot
from spte.mmu.slot.split import split_slot
from spte.mmu.slot.write_protect import count_protected, write_protect_slot
from spte.vm.kvm import Kvm
from spte.vm.memslots import ADDRESS_SPACES, Memslot, check_slot_number
from spte.vm.vcpu_run import Ioctl


def _write_protect(kvm: Kvm, slot: Memslot, level: int, tdp_level: int) -> int:
    """Write-protect the leaves of `slot` of `level` and above, those of the TDP MMU from `tdp_level` on; returns SPTEs written."""
    t, where = kvm.mmu.tables, (slot.as_id, slot.base_gfn, slot.end_gfn)
    rewritten = int(count_protected(t, *where, tdp_level)) if kvm.policy.tdp_rewrites else 0
    with kvm.mmu.traced():
        return rewritten + int(write_protect_slot(t, *where, level, tdp_level))


def arm_slot(kvm: Kvm, slot: Memslot) -> None:
    """Make the first write to each page of `slot` visible, as logging begins: kvm_mmu_slot_apply_flags.

    Huge leaves are split, D or W is cleared, the TLBs are flushed.
    """
    t, m, policy = kvm.mmu.tables, kvm.mmu.mode, kvm.policy
    all_set, pml = kvm.manual == 3, bool(m[0].dirty_log_size)
    if slot.flags & READONLY or (all_set and policy.initially_set_enable == "nothing"):
        return
    if m[0].eager and not all_set:
        if kvm.memslots.has_rmaps(slot):
            s, k = kvm.memslots.row_of(slot)
            split_slot_rmaps(t, s, m, k)
        with kvm.mmu.traced():
            split_slot(t, m, kvm.mmu.roots_of(slot), slot.base_gfn, slot.end_gfn)
    cleared = 0
    if pml and not all_set:
        with kvm.mmu.traced():
            cleared = int(clear_dirty_slot(t, m, slot.as_id, slot.base_gfn, slot.end_gfn))
    level = 2 if pml or all_set else 1
    own_routine = pml and not policy.one_write_protect
    protected = _write_protect(kvm, slot, level, level if policy.tdp_start_level or own_routine else 1)
    t.kvm[0].sptes_written += cleared + protected
    if policy.enable_flush == "always":
        kvm.mmu.flush()
    else:
        for changed in (cleared, protected):
            if changed:
                kvm.mmu.flush()


def collapse(kvm: Kvm, slot: Memslot) -> None:
    """Make huge mappings of `slot` possible again, as logging ends: kvm_mmu_recover_huge_pages, kvm_mmu_zap_collapsible_sptes.

    Before patch 12 also set D, to silence PML.
    """
    t, m = kvm.mmu.tables, kvm.mmu.mode
    if slot.flags & READONLY:
        return
    s, k = kvm.memslots.row_of(slot)
    if kvm.memslots.has_rmaps(slot):
        # The walk took in the rmaps of level 2 later.
        levels = np.int64(1 if kvm.policy.collapse == "zap-leaf" else 2)
        if zap_collapsible_rmaps(t, s, the_host(), m, k, levels):
            kvm.mmu.flush()
    roots = kvm.mmu.roots_of(slot)
    with kvm.mmu.traced():
        if kvm.policy.collapse == "zap-leaf":
            done = [zap_collapsible(t, s, the_host(), m, k, int(t.pages[root].role) & ROLE_GUEST_MODE) for root in roots]
        else:
            done = [collapse_slot(t, s, the_host(), m, roots, k)]
    for dropped in done:
        if dropped and not m[0].flush_each:
            kvm.mmu.flush()
    if kvm.policy.disable_sets_dirty and m[0].dirty_log_size:
        with kvm.mmu.traced():
            written, flush = set_dirty_slot(t, m, slot.as_id, slot.base_gfn, slot.end_gfn, kvm.policy.tdp_rewrites)
        t.kvm[0].sptes_written += written
        if flush:
            kvm.mmu.flush()


def _logging_slot(kvm: Kvm, slot: int) -> Memslot:
    memslot = kvm.memslots.find(slot)
    if memslot is None or memslot.bitmap < 0:
        why = "does not log" if memslot else "does not exist"
        raise NoDirtyLogError(f"slot={slot:#x} {why}; set flags=1 (LOG_DIRTY_PAGES) first")
    return memslot


def _refuse_ring(kvm: Kvm) -> None:
    if kvm.ring_entries:
        raise DirtyRingInUseError("the VM logs to dirty rings; harvest vcpu.ring and call reset_dirty_rings()")


def bytes_of(buffer: Any, name: str) -> npt.NDArray[np.uint8]:
    """Return a view of the bytes of a buffer, as an ioctl sees it; TypeError if it has none that lie side by side."""
    if type(buffer) is np.ndarray and buffer.dtype == np.uint64 and buffer.flags.c_contiguous:
        return buffer.reshape(-1).view(np.uint8)
    try:
        view = memoryview(buffer)
        plain = view.c_contiguous and not np.asarray(view).dtype.hasobject
    except (TypeError, ValueError, BufferError):
        plain = False
    if not plain:
        raise TypeError(f"{name}={spell(buffer)} is no C-contiguous buffer; pass an array of uint64, or any other buffer of as many bytes")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.zeros(0, np.uint8)


def _check_user_copy(data: npt.NDArray[np.uint8], words: int, name: str, *, write: bool) -> None:
    """Refuse bytes that a copy from or to userspace would fault on."""
    if len(data) < 8 * words or (write and words and not data.flags.writeable):
        what = "read-only" if len(data) >= 8 * words else f"{len(data)} bytes long"
        raise BufferFaultError(f"{name} is {what}; pass {8 * words} {'writable ' if write else ''}bytes, uint64[{words}]")


def _words_of(out: npt.NDArray[np.uint8] | None, count: int) -> U64s | None:
    """Return the first `count` words of bytes that a harvest can write to itself; None: it is to be copied there, or refused."""
    if out is None or len(out) < 8 * count or not out.flags.writeable:
        return None
    words = out[: 8 * count].view(np.uint64)
    return words if words.flags.aligned else None


def goes_beside(kvm: Kvm) -> bool:
    """Tell whether a harvest can go beside vCPUs that run on other threads."""
    return not (kvm.mmu.has_shadow_pages or kvm.mmu.log.on or kvm.vcpus_in_guest or kvm.mmu.mode[0].clear_arms_huge)


def harvest(kvm: Kvm) -> AbstractContextManager[bool]:
    """Hold other ioctls off, but no vCPU where a harvest can go beside them (True); else do as `Ioctl` (False)."""
    return _beside(kvm) if kvm.exclusive.met and not kvm.exclusive.is_mine else Ioctl(kvm)


@contextmanager
def _beside(kvm: Kvm) -> Iterator[bool]:
    with kvm.exclusive.beside_runs():
        kvm.check_alive()
        if goes_beside(kvm):
            yield True
            return
    with Ioctl(kvm) as beside:
        yield beside


def _sync(kvm: Kvm, beside: bool) -> None:
    """Have the PML buffers drained and count the kicks: kvm_arch_sync_dirty_log. Without `beside` the ioctl has drained them already."""
    if kvm.platform.cpu_dirty_log_size or kvm.policy.sync_kicks_without_pml:
        _count(kvm, "vcpu_kicks", len(kvm.vcpus))
        if beside:
            kvm.kick_and_wait()


def _count(kvm: Kvm, counter: str, n: int) -> None:
    if not n:
        return
    with kvm.counting:
        kvm.mmu.tables.kvm[counter][0] += n


def _flush(kvm: Kvm, beside: bool) -> None:
    """Flush TLBs; `beside`: who may still write through what it took away has done so at the return."""
    _count(kvm, "remote_tlb_flush_requests", 1)
    if beside:
        kvm.kick_and_wait()


def get(kvm: Kvm, slot: int, out: npt.NDArray[np.uint8] | None, beside: bool) -> U64s:
    """KVM_GET_DIRTY_LOG; what is dirty is exchanged, re-armed and flushed before the bytes of `out` are looked at."""
    _refuse_ring(kvm)
    check_slot_number(slot, kvm.memslots.user_mem_slots)
    memslot = _logging_slot(kvm, slot)
    _sync(kvm, beside)
    given = _words_of(out, memslot.words)
    if kvm.manual:
        snapshot = kvm.memslots.bitmap(memslot).copy()
    else:
        if given is None:
            snapshot = np.zeros(memslot.words, np.uint64)
        else:
            snapshot = given
            snapshot.fill(0)
        s, k = kvm.memslots.row_of(memslot)
        args = s, kvm.mmu.mode, kvm.mmu.roots_of(memslot), k, snapshot
        with kvm.mmu.traced():
            found, changed = get_dirty_log_shared(kvm.shared_tables, *args) if beside else get_dirty_log(kvm.mmu.tables, *args)
        _count(kvm, "sptes_written", changed)
        if found:
            _flush(kvm, beside)
    if out is not None and snapshot is not given:
        _check_user_copy(out, memslot.words, "out", write=True)
        out[: 8 * memslot.words] = snapshot.view(np.uint8)
    return snapshot


def clear(kvm: Kvm, slot: int, first_page: int, num_pages: int, bitmap: npt.NDArray[np.uint8], beside: bool) -> None:
    """KVM_CLEAR_DIRTY_LOG; vCPUs are kicked before the bytes of `bitmap` are looked at, nothing else changes before."""
    _refuse_ring(kvm)
    check_slot_number(slot, kvm.memslots.user_mem_slots)
    if first_page % 64 or first_page < 0:
        raise ClearRangeError(f"first_page={first_page} is not a multiple of 64; round down to {max(first_page & ~63, 0)}")
    memslot = _logging_slot(kvm, slot)
    left = memslot.npages - first_page
    if left < 0 or not 0 <= num_pages <= left or (num_pages < left and num_pages % 64):
        raise ClearRangeError(
            f"first_page={first_page}, num_pages={num_pages} of a slot of {memslot.npages} pages; take a multiple of 64, or up to the end"
        )
    words = (num_pages + 63) // 64
    _sync(kvm, beside)
    _check_user_copy(bitmap, words, "bitmap", write=False)
    wanted = kvm.memslots.scratch(memslot)[:words]
    wanted.view(np.uint8)[:] = bitmap[: 8 * words]
    s, k = kvm.memslots.row_of(memslot)
    args = s, kvm.mmu.mode, kvm.mmu.roots_of(memslot), k, np.int64(first_page >> 6), wanted
    with kvm.mmu.traced():
        found, changed = clear_dirty_log_shared(kvm.shared_tables, *args) if beside else clear_dirty_log(kvm.mmu.tables, *args)
    _count(kvm, "sptes_written", changed)
    if found:
        _flush(kvm, beside)


def reset_rings(kvm: Kvm, beside: bool) -> int:
    """KVM_RESET_DIRTY_RINGS: free the harvested entries of every ring and re-arm their pages; returns entries freed."""
    if not kvm.policy.dirty_ring:
        raise NoRingIoctlError(f"policy {kvm.policy.name} has no dirty rings; harvest by get_dirty_log()")
    if not kvm.ring_entries:
        raise RingDisabledError("the VM has no dirty rings; pass ring_bytes when making it")
    freed = 0
    spaces, roots = tuple(kvm.memslots.spaces), tuple(kvm.mmu.roots(as_id) for as_id in range(ADDRESS_SPACES))
    for vcpu in kvm.vcpus:
        args = spaces, kvm.mmu.mode, vcpu.arrays, roots
        with kvm.mmu.traced():
            got, changed = reset_ring_shared(kvm.shared_tables, *args) if beside else reset_ring(kvm.mmu.tables, *args)
        kvm.mmu.log.ring_reset(vcpu.index, vcpu.arrays)
        _count(kvm, "sptes_written", changed)
        freed += got
    if freed:
        _flush(kvm, beside)
    return int(freed)
