"""Wrong input of guests that run guests: a message with the value and the way out, and nothing has changed."""

import re

import numpy as np
import pytest
from conftest import PAGE
from programs.nest import L2, TABLES_GFN, TABLES_PAGES, Nest

import spte
from spte.errors import GuestTablesError, NestedError, SlotAlignmentError, SlotRangeError
from spte.guest_tables import GuestTables


def state(nest):
    vcpu = nest.vm.vcpus[0]
    tables = np.stack([nest.table_memory.table(page) for page in range(TABLES_PAGES)])
    return vcpu.nested.l2, vcpu.cr3, vcpu.arrays.vcpu[0].tobytes(), nest.vm.roots(), nest.vm.stats(), tables.tobytes(), nest.tables.roots


def outside(vcpu, nest):
    """The vCPU runs L1."""


def inside(vcpu, nest):
    nest.enter()
    nest.write_as_l2([1])


REFUSED = [
    ("ept-pml", inside, lambda v, n: v.load_cr3(0), NestedError, "the vCPU runs L2; call leave_l2() first"),
    ("shadow", outside, lambda v, n: v.load_cr3(0x1001), NestedError, "gpa=0x1001 is not the address of a page below 48 bits"),
    ("shadow", outside, lambda v, n: v.load_cr3(-PAGE), NestedError, "gpa=-0x1000 is not"),
    ("npt", inside, lambda v, n: v.enter_l2(n.tables.address()), NestedError, "the vCPU runs L2 already; call leave_l2() first"),
    ("npt", outside, lambda v, n: v.enter_l2(8), NestedError, "ept=0x8 is not the address of a page below 48 bits; round down to 0x0"),
    ("npt", outside, lambda v, n: v.enter_l2(1 << 48), NestedError, "ept=0x1000000000000 is not the address of a page below 48 bits"),
    ("npt", outside, lambda v, n: v.enter_l2(vmcb=0x2004), NestedError, "vmcb=0x2004 is not the address of a page"),
    ("ept-pml", outside, lambda v, n: v.enter_l2(0, pml=0x2004), NestedError, "pml=0x2004 is not the address of a page"),
    ("ept-pml", outside, lambda v, n: v.enter_l2(pml=0x2000), NestedError, "needs an EPT of L1 with A/D bits; pass ept=..., ad=True"),
    ("ept-pml", outside, lambda v, n: v.enter_l2(0, ad=False, pml=0x2000), NestedError, "pml=0x2000 needs an EPT of L1 with A/D bits"),
    ("ept-noad", outside, lambda v, n: v.enter_l2(0, pml=0x2000), NestedError, "pml=0x2000 needs an EPT of L1 with A/D bits"),
    ("npt", outside, lambda v, n: v.enter_l2(0, pml=0x2000), NestedError, "pml=0x2000 needs an EPT of L1 with A/D bits"),
    ("shadow", inside, lambda v, n: v.enter_l2(0), NestedError, "under shadow paging L2 has no EPT or NPT, and L1 its paging on"),
    ("shadow", outside, lambda v, n: v.enter_l2(), NestedError, "pass ept=None after load_cr3()"),
    ("ept-pml", outside, lambda v, n: v.leave_l2(), NestedError, "the vCPU does not run L2; call enter_l2() first"),
    ("ept-pml", outside, lambda v, n: setattr(v, "l1_pml_index", 1 << 16), NestedError, "l1_pml_index=65536 is not a 16-bit index"),
    ("ept-pml", outside, lambda v, n: setattr(v, "l1_pml_index", -1), NestedError, "-1 is not a 16-bit index; an empty buffer has 511"),
    ("npt", outside, lambda v, n: v.store(0x1004, 1), SlotAlignmentError, "store of 0x1 at 0x1004: take a multiple of 8 and 64 bits"),
    ("npt", outside, lambda v, n: v.store(0x1000, 1 << 64), SlotAlignmentError, "value=an integer of 65 bits does not fit 64 bits"),
    ("npt", outside, lambda v, n: v.store(0x1000, -1), SlotAlignmentError, "store of -0x1 at 0x1000"),
    ("npt", outside, lambda v, n: v.store((1 << 60) + 8, 1), SlotRangeError, "gfn 0x1000000000000 is outside the 48 bits"),
    ("npt", inside, lambda v, n: v.store((1 << 48) + 8, 1), SlotRangeError, "gfn 0x1000000000 is outside the 48 bits"),
]  # fmt: skip

TABLES_REFUSED = [
    (lambda t: t.map(1, 0, level=2), "gfn=0x1, to=0x0, level=2, perm=7: take level 1, 2 or 3, its multiples, perm 0..7"),
    (lambda t: t.map(0, 1, level=2), "gfn=0x0, to=0x1, level=2"),
    (lambda t: t.map(0, 0, level=4), "level=4, perm=7: take level 1, 2 or 3"),
    (lambda t: t.map(0, 0, perm=8), "perm=8: take level 1, 2 or 3, its multiples, perm 0..7"),
    (lambda t: t.map(-512, 0), "gfn=-0x200, to=0x0, count=1 leave 36 bits of gfn or 40 of frame"),
    (lambda t: t.map(0, -1), "gfn=0x0, to=-0x1, count=1 leave 36 bits"),
    (lambda t: t.map((1 << 36) - 1, 0, 2), "gfn=0xfffffffff, to=0x0, count=2 leave 36 bits of gfn"),
    (lambda t: t.map(0, (1 << 40) - 1, 2), "to=0xffffffffff, count=2 leave 36 bits of gfn or 40 of frame"),
    (lambda t: t.map(0, 0, -1), "count=-1 leave 36 bits"),
    (lambda t: t.map(0, 0, root=1), "root=1 was not added; there are 1"),
    (lambda t: t.map(0, 0, root=-1), "root=-1 was not added; there are 1"),
    (lambda t: t.map(L2 - 512, 0, 1024), "gfn=0x10000 is mapped by a page of level 2; map it once"),
    (lambda t: t.map(0, 0, 512 * TABLES_PAGES), f"no page left for guest tables behind gfn {TABLES_GFN + TABLES_PAGES - 1:#x}"),
]  # fmt: skip


@pytest.mark.parametrize(("platform", "before", "call", "error", "message"), REFUSED)
def test_a_vcpu_refuses_and_nothing_has_changed(platform, before, call, error, message):
    nest = Nest(platform)
    vcpu = nest.vm.vcpus[0]
    nest.write([0])
    before(vcpu, nest)
    ref = state(nest)
    with pytest.raises(error, match=re.escape(message)) as raised:
        call(vcpu, nest)
    assert raised.value.errno_name == "EINVAL"
    assert state(nest) == ref
    nest.vm.check()


@pytest.mark.parametrize(("call", "message"), TABLES_REFUSED)
def test_guest_tables_refuse_and_nothing_has_changed(call, message):
    nest = Nest("npt", level=2)
    ref = state(nest)
    with pytest.raises(GuestTablesError, match=re.escape(message)):
        call(nest.tables)
    assert state(nest) == ref
    nest.tables.map(0, 0, 512 * 8)  # the pages are still there
    assert nest.tables.translate(512 * 8 - 1) == 512 * 8 - 1


@pytest.mark.parametrize(("more", "message"), [
    ({"kind": "pae"}, "kind='pae' of guest tables is not known; take one of ept, npt, long"),
    ({"gpa": 0x1008}, "gpa=0x1008 is not the address of a page; round down"),
    ({"page": 4}, "no page left for guest tables behind gfn 0x4; give them more memory"),
])  # fmt: skip
def test_guest_tables_that_can_not_be_are_refused(more, message):
    memory = spte.Backing("4k", 4 * PAGE)
    with pytest.raises(GuestTablesError, match=re.escape(message)):
        GuestTables(memory, **{"gpa": PAGE, **more})


@pytest.mark.parametrize("call", [
    lambda v, n: v.enter_l2(n.tables.address()), lambda v, n: v.load_cr3(n.tables.address()), lambda v, n: v.store(0, 0),
])  # fmt: skip
def test_a_closed_vm_enters_no_guest(platform, call):
    nest = Nest(platform)
    nest.vm.close()
    ref = state(nest)
    with pytest.raises(spte.KvmError, match="the VM was closed; make a new one"):
        call(nest.vm.vcpus[0], nest)
    assert state(nest) == ref


def test_a_store_that_is_refused_leaves_no_offset_behind(platform):
    """The next write to a table is at its start: it costs the entry there, not that of the store."""
    nest = Nest(platform, vcpus=2)
    nest.enter(0)
    nest.write_as_l2([5, 600])
    address, _, _ = nest.entry(5)
    table = nest.tables.walk(L2 + 5)[0][-2]
    vcpu = nest.vm.vcpus[1]
    offset = 8 * (L2 >> 9 & 511)
    with pytest.raises(SlotRangeError):
        vcpu.store((1 << 60) + offset, 0)
    before = nest.faults(0)
    assert vcpu.write([table]) is None
    nest.write_as_l2([5])
    assert nest.faults(0) == before
    assert address >> 12 != table


def test_ept_has_no_write_without_read():
    nest = Nest("ept-pml")
    with pytest.raises(GuestTablesError, match=re.escape("perm=2 writes what it can not read, an EPT misconfiguration; add READ (1)")):
        nest.tables.map(0, 0, perm=2)
