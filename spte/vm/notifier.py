"""KVM's side of the mmu notifiers, and KVM's own writes to guest memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from spte.arrays.slots import READONLY
from spte.host import pages as hostmm
from spte.mmu.mark_dirty import mark_dirty

if TYPE_CHECKING:
    from spte.vm.memslots import Memslot
    from spte.vm.vm import VM

Ranges = list[tuple[int, int]]  # first host page, pages


def _mapped_at(vm: VM, hpage: int, count: int) -> Iterator[tuple[Memslot, int, int]]:
    """Yield ``(slot, start gfn, end gfn)`` of what memslots map of host pages ``[hpage, hpage + count)``."""
    for slot in vm.memslots:
        first = slot.hva >> 12
        start, end = max(hpage, first), min(hpage + count, first + slot.npages)
        if start < end:
            yield slot, start - first + slot.base_gfn, end - first + slot.base_gfn


def unmap(vms: Iterable[VM], ranges: Ranges) -> None:
    """Drop every SPTE of `ranges` of host pages, one notifier range together: one flush a VM that had some."""
    for vm in vms:
        dropped = sum(vm.mmu.zap_gfns(*place) for hpage, count in ranges for place in _mapped_at(vm, hpage, count))
        if dropped:
            vm.mmu.flush()


def age(vms: Iterable[VM], hpage: int, count: int) -> None:
    """Take the accessed state of ``[hpage, hpage + count)``, page by page; a flush for each that had it, if the policy flushes."""
    for vm in vms:
        for page in range(hpage, hpage + count):
            young = sum(vm.mmu.age_gfns(*place, clear=True) for place in _mapped_at(vm, page, 1))
            if young and vm.policy.aging_flush:
                vm.mmu.flush()


def host_write(hpage: int, vms: Iterable[VM]) -> None:
    """Make the host map `hpage` writable, copying a zero page, with a notifier."""
    if hostmm.write_page(np.int64(hpage)) == hostmm.HOST_COW:
        unmap(vms, [(hpage, 1)])


def kernel_write(vm: VM, gfn: int, vcpu: int) -> None:
    """Write a page as KVM does: dirty in the log of its slot, no SPTE; without a writable slot and host page nothing happens."""
    slot = vm.memslots.at(gfn)
    if slot is None or slot.flags & READONLY:
        return
    hpage = (slot.hva >> 12) + gfn - slot.base_gfn
    code = hostmm.write_page(np.int64(hpage))
    if code == hostmm.HOST_EFAULT:
        return
    if code == hostmm.HOST_COW and slot.backing is not None:
        unmap(slot.backing.users, [(hpage, 1)])
    s, k = vm.memslots.place(slot)
    arrays = vm.vcpus[vcpu].arrays
    mark_dirty(vm.mmu.tables, s, arrays, np.int64(k), np.int64(gfn))
    vm.mmu.log.collect(vcpu, arrays)
