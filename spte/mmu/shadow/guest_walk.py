"""KVM's walk over the guest tables that it shadows, with the A and D bits that it sets there, and L1's own PML."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.arrays.vcpu import EXEC, WRITE
from spte.bits import ACC_ALL, ACC_EXEC, ACC_USER, ACC_WRITE, LARGE, SHIFT_PAGE, U64, ZERO
from spte.host.guest_memory import write_word
from spte.mmu.mark_dirty import mark_dirty
from spte.mmu.memslot import find_slot
from spte.mmu.shadow.sync import clean_access, gpte_access, gpte_gfn, read_gpte
from spte.mmu.walk import index_of

WALK_OK, WALK_FAULT, WALK_PML_FULL = 0, 1, 2
PML_ENTRIES = 512
TOP = 4


@helper
def _store(t, s, h, v, gfn, i, value):
    """Write a word of guest memory as KVM does; returns nothing where no slot is."""
    k = find_slot(s, gfn)
    if k >= 0:
        write_word(h, s.slots[k].hpage + gfn - s.slots[k].base_gfn, i, value)
        mark_dirty(t, s, v, k, gfn)


@helper
def _log_for_l1(t, s, h, v, gfn):
    """Log L2's write of `gfn` in L1's PML buffer, if L1 has one; False if it is full."""
    vcpu = v.vcpu[0]
    if vcpu.l1_pml_gfn < 0:
        return True
    index = vcpu.l1_pml_index
    if index >= PML_ENTRIES:
        return False
    _store(t, s, h, v, vcpu.l1_pml_gfn, index, U64(gfn) << SHIFT_PAGE)
    vcpu.l1_pml_index = (index - 1) & 0xFFFF
    return True


@helper
def _set_used(t, s, h, v, m, gfn, level, write):
    """Set A in the entries of the walk, D in the last one for a write, as the CPU would; False if L1's PML buffer is full."""
    for at in range(TOP, level - 1, -1):
        table = v.vcpu[0].walker.table_gfn[at]
        i = index_of(gfn, at)
        gpte = read_gpte(s, h, table, i)
        new = gpte | m.gpte.accessed
        if at == level and write and (gpte & m.gpte.dirty) != m.gpte.dirty:
            if not _log_for_l1(t, s, h, v, gfn):
                return False
            new |= m.gpte.dirty
        if new != gpte:
            _store(t, s, h, v, table, i, new)
    return True


@helper
def allows(access, kind):
    """Tell whether guest tables that allow `access` let an access of `kind` through."""
    if kind == WRITE:
        return access & ACC_WRITE != 0
    return access & (ACC_EXEC if kind == EXEC else ACC_USER) != 0


@kernel_noinline
def walk_guest(t, s, h, v, m, gfn, kind):
    """Walk the guest's tables for `gfn`, an address of theirs; fills ``v.guest``. After WALK_FAULT its access is the entry's.

    Reserved bits are not looked at: tables that have some set, or a large page at level 4, are mapped as if they were valid.
    """
    vcpu = v.vcpu[0]
    table = vcpu.pgd
    access = np.int64(ACC_ALL)
    level = np.int64(TOP)
    while True:
        i = index_of(gfn, level)
        gpte = read_gpte(s, h, table, i)
        vcpu.walker.level = level
        vcpu.walker.table_gfn[level] = table
        vcpu.walker.pt_access[level] = access
        if (gpte & m.gpte.present) == ZERO:
            vcpu.walker.pte_access = 0
            return WALK_FAULT
        access &= gpte_access(m, gpte)
        if level == 1 or (gpte & LARGE) != ZERO:
            break
        table = gpte_gfn(gpte)
        level -= 1
    vcpu.walker.pte_access = access
    if not allows(access, kind):
        return WALK_FAULT
    vcpu.walker.gfn = gpte_gfn(gpte) + (gfn & ((np.int64(1) << (9 * (level - 1))) - 1))
    if kind != WRITE:
        vcpu.walker.pte_access = clean_access(m, gpte, access)
    if m.gpte.accessed != ZERO and not _set_used(t, s, h, v, m, gfn, level, kind == WRITE):
        return WALK_PML_FULL
    return WALK_OK
