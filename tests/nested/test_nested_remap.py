"""L1's tables change while KVM shadows them, or lie where tables rarely do; what a run of accesses meets when it goes on."""

import numpy as np
import pytest
from conftest import LOG, PAGE
from programs.nest import L2, TABLES_GFN, Nest

import spte
from spte import mm
from spte.errors import NestedError, OutOfTablesError
from spte.guest_tables import FRAME

UNMAPPED = 1 << 26  # a gfn in no memslot
EPT_AND_NPT = ("ept-pml", "ept-noad", "ept-pml-rmap", "npt")


def remapped(nest, page, to):
    """Let the running guest's entry for a page of the data name gfn `to`."""
    place, value, _ = nest.entry(page)
    assert nest.vm.vcpus[0].store(place, value & ~FRAME | to << 12) is None


@pytest.mark.parametrize("platform", EPT_AND_NPT)
def test_another_gfn_on_the_same_host_page_is_dropped_with_the_page(platform):
    """Two slots on one backing: the entry keeps its pfn, and what the host takes away leaves no entry and no loop behind."""
    nest = Nest(platform)
    alias = nest.base + (1 << 20)
    nest.vm.set_memory_region(2, alias * PAGE, nest.npages * PAGE, nest.memory)
    nest.enter()
    nest.write_as_l2([0])
    nest.set_flags(LOG)
    nest.leave()
    remapped(nest, 0, alias)
    nest.enter()
    nest.write_as_l2([0])
    mm.madvise(nest.memory, 0, 1)
    nest.vm.check()
    nest.write_as_l2([0])
    assert nest.reaches(L2) == (0, 1)


@pytest.mark.parametrize("platform", EPT_AND_NPT)
def test_an_mmio_entry_ends_when_the_table_names_memory(platform):
    nest = Nest(platform)
    vcpu = nest.vm.vcpus[0]
    remapped(nest, 0, UNMAPPED)
    nest.enter()
    assert vcpu.read([L2]).reason == "mmio"
    nest.leave()
    remapped(nest, 0, nest.base)
    vcpu.invept()
    nest.enter()
    assert vcpu.read([L2]) is None
    nest.vm.check()


@pytest.mark.parametrize("platform", [*EPT_AND_NPT, "shadow"])
@pytest.mark.parametrize("gfn", [63, UNMAPPED, (1 << 36) - 1])
def test_a_root_table_in_no_memslot_is_refused(platform, gfn):
    nest = Nest(platform)
    nest.write(range(64))
    before = nest.vm.leafs(), nest.vm.stats(), nest.vm.roots()
    enter = nest.vm.vcpus[0].load_cr3 if platform == "shadow" else nest.vm.vcpus[0].enter_l2
    with pytest.raises(NestedError, match=f"root table {gfn << 12:#x} of the guest is in no memslot; create one there first"):
        enter(gfn << 12)
    assert (nest.vm.leafs(), nest.vm.stats(), nest.vm.roots()) == before
    assert not nest.vm.vcpus[0].in_l2


def test_a_full_ring_stops_a_run_that_goes_on(platform):
    nest = Nest(platform, npages=4096, mode="ring")
    nest.set_flags(LOG)
    nest.enter()
    vcpu, pages = nest.vm.vcpus[0], list(range(3000))
    assert vcpu.run(nest.at([0]), [spte.READ], leave=False) is None
    stop = vcpu.write(nest.at(pages))
    assert stop.reason == "dirty_ring_full"
    assert stop.index < 2048
    nest.write_as_l2(pages[stop.index :])
    assert set(nest.harvest()) == set(pages)


@pytest.mark.parametrize("nested", [True, False])
def test_a_slot_deleted_during_a_run_is_gone(platform, nested):
    nest = Nest(platform)
    vcpu = nest.vm.vcpus[0]
    if nested:
        nest.enter()
    gfns = nest.at([0, 16, 17]) if nested else np.array([0, 16, 17]) + nest.base
    assert vcpu.run(gfns[:1], [spte.WRITE], leave=False) is None
    nest.vm.set_memory_region(0, 0, 0)
    nest.vm.set_memory_region(0, nest.base * PAGE, nest.npages * PAGE, nest.memory)
    assert vcpu.write(gfns[1:]) is None
    nest.vm.check()
    mapped = {first + i for level, first, n, _ in nest.vm.leafs() for i in range(n)}
    assert [gfn in mapped for gfn in gfns] == [False, True, True]


def test_a_table_at_another_virtual_address_is_the_one_that_a_store_changes():
    """The flood of writes zaps its page; every one of them reaches the table all the same."""
    nest = Nest("shadow")
    window = 0x50000
    nest.tables.map(window, TABLES_GFN, 64)
    nest.enter()
    nest.write_as_l2([0])
    pages, _, _ = nest.tables.walk(L2)
    table = pages[2]  # of level 2, tracked
    words = nest.table_memory.table(table - TABLES_GFN)
    for n in range(1, 6):
        assert nest.vm.vcpus[0].store((window + table - TABLES_GFN << 12) + 8 * (256 + n), 0x1000 * n) is None
        assert words[256 + n] == 0x1000 * n
    nest.vm.check()


@pytest.mark.parametrize("platform", EPT_AND_NPT)
def test_a_store_to_a_table_in_memory_that_was_only_read_copies_the_zero_page(platform):
    nest = Nest(platform, populate=False)
    vcpu = nest.vm.vcpus[0]
    vcpu.read([nest.base])
    vcpu.enter_l2(nest.base << 12)
    assert vcpu.read([5]) is not None  # to L1: the table is empty
    assert vcpu.store(nest.base << 12, 0x123) is None
    assert nest.memory.table(0)[0] == 0x123
    other = spte.Backing("4k", PAGE)
    assert other.table(0)[0] == 0


def test_rmaps_that_find_no_room_leave_the_vcpu_in_l1():
    nest = Nest("ept-pml")
    pages = (1 << 31) - 512
    big = spte.Backing("4k", pages * PAGE)
    for n in range(6):
        nest.vm.set_memory_region(10 + n, ((1 << 24) + n * (1 << 31)) * PAGE, pages * PAGE, big)
    for _ in range(2):
        with pytest.raises(OutOfTablesError, match="delete slots"):
            nest.enter()
        assert not nest.vm.vcpus[0].in_l2
    nest.write([0])
    for n in range(1, 6):
        nest.vm.set_memory_region(10 + n, 0, 0)
    nest.enter()
    nest.write_as_l2([1])
    nest.vm.check()
