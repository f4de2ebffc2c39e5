"""Host memory under a guest: mprotect, fork, soft-dirty, and writes that do not come from the guest, rule by rule."""

import pytest
from conftest import LOG, PAGE
from programs.host_machine import BASE, ONE_FAULT, RO, Machine

import spte
from spte import mm

READ_ONLY, READ_WRITE = mm.PROT_READ, mm.PROT_READ_WRITE


# -- mprotect


@pytest.mark.parametrize("kind", ["4k", "thp", "shm"])
def test_mprotect_cuts_at_an_unaligned_edge_unmap_the_2_mib_block_with_one_flush(kind):
    m = Machine(kind)
    m.write(0, 2, 511, 512)
    assert m.flushes_of(mm.mprotect, m.memory, 0, 4, READ_ONLY) == 1
    assert sorted(m.leafs()) == [512]
    m.read(2)
    assert m.leafs()[2] == "825"


def test_mprotect_with_two_unaligned_edges_flushes_for_each_cut_block():
    m = Machine()
    m.write(0, 200, 600)
    assert m.flushes_of(mm.mprotect, m.memory, 100, 500, READ_ONLY) == 2
    assert m.leafs() == {}


def test_mprotect_of_whole_blocks_unmaps_just_them_and_they_stay_huge():
    m = Machine("thp")
    m.write(0, 512)
    assert m.flushes_of(mm.mprotect, m.memory, 512, 512, READ_ONLY) == 1
    m.read(512)
    assert m.leafs() == {0: "ee7", 512: "8a5"}
    mm.mprotect(m.memory, 512, 512, READ_WRITE)
    m.read(512)
    assert m.leafs() == {0: "ee7", 512: "ee7"}


def test_mprotect_back_unmaps_the_range_only_and_pages_are_writable_again():
    m = Machine()
    mm.mprotect(m.memory, 0, 4, READ_ONLY)
    m.write(4)
    m.read(0)
    assert m.flushes_of(mm.mprotect, m.memory, 0, 4, READ_WRITE) == 1
    assert m.leafs() == {4: "e67"}
    assert m.read(0) == ONE_FAULT
    assert m.leafs() == {0: "e67", 4: "e67"}


def test_mprotect_to_what_a_mapping_already_is_unmaps_nothing():
    m = Machine()
    mm.mprotect(m.memory, 0, 4, READ_ONLY)
    m.read(0, 1)
    m.write(600)
    assert m.flushes_of(mm.mprotect, m.memory, 0, 4, READ_ONLY) == 0
    assert m.flushes_of(mm.mprotect, m.memory, 512, 512, READ_WRITE) == 0
    assert m.leafs() == {0: "825", 1: "825", 600: "e67"}


def test_a_cut_in_a_block_that_is_two_mappings_already_unmaps_the_range_only():
    m = Machine()
    mm.mprotect(m.memory, 0, 4, READ_ONLY)
    m.write(4, 100)
    assert m.flushes_of(mm.mprotect, m.memory, 4, 4, READ_ONLY) == 1
    assert sorted(m.leafs()) == [100]


@pytest.mark.parametrize("mapped", [True, False])
def test_a_write_to_a_protected_page_is_efault_and_counts_a_fault_alone(mapped):
    m = Machine(flags=LOG)
    mm.mprotect(m.memory, 0, 4, READ_ONLY)
    if mapped:
        m.read(1)
    before = m.leafs()
    assert m.write(1) == {"pf_taken": 1}
    assert m.vm.vcpus[0].write([BASE + 5, BASE + 1]).reason == "efault"
    assert m.leafs() == {**before, 5: "e67"}
    assert m.dirty() == {5}


def test_a_zero_page_is_copied_after_protection_and_back_as_before():
    m = Machine(populate=False)
    mm.mprotect(m.memory, 0, 4, READ_ONLY)
    m.read(1)
    mm.mprotect(m.memory, 0, 4, READ_WRITE)
    m.read(1)
    assert m.leafs() == {1: "825"}
    assert m.write(1) == {"pf_taken": 2, "pf_fixed": 1}


@pytest.mark.parametrize("advice", [mm.DONTNEED, mm.FREE])
def test_advice_does_not_lift_a_protection(advice):
    for kind in ("4k", "thp"):
        m = Machine(kind)
        mm.mprotect(m.memory, 0, 512, READ_ONLY)
        mm.madvise(m.memory, 0, 512, advice)
        assert m.write(1) == {"pf_taken": 1}


def test_an_empty_thp_block_that_was_protected_and_back_is_filled_huge():
    m = Machine("thp", populate=False)
    mm.mprotect(m.memory, 0, 512, READ_ONLY)
    mm.mprotect(m.memory, 0, 512, READ_WRITE)
    m.read(0)
    assert m.leafs() == {0: "ee7"}


@pytest.mark.parametrize("share", [mm.fork, mm.clear_refs])
@pytest.mark.parametrize("kind", ["4k", "thp"])
def test_a_page_stays_write_protected_through_a_protection_and_back(kind, share):
    m = Machine(kind)
    share([m.memory])
    mm.mprotect(m.memory, 0, 512, READ_ONLY)
    mm.mprotect(m.memory, 0, 512, READ_WRITE)
    m.read(0)
    assert m.leafs() == {0: {"4k": "825", "thp": "8a5"}[kind]}


@pytest.mark.parametrize("share", [mm.fork, mm.clear_refs])
@pytest.mark.parametrize("kind", ["4k", "thp"])
def test_a_protected_page_is_write_protected_too(kind, share):
    m = Machine(kind)
    mm.mprotect(m.memory, 0, 512, READ_ONLY)
    share([m.memory])
    mm.mprotect(m.memory, 0, 512, READ_WRITE)
    m.read(0)
    assert m.leafs() == {0: {"4k": "825", "thp": "8a5"}[kind]}


def test_half_a_hugetlb_page_can_not_be_protected():
    m = Machine("hugetlb2m")
    with pytest.raises(spte.KvmError, match="EINVAL"):
        mm.mprotect(m.memory, 0, 4, READ_ONLY)
    with pytest.raises(spte.KvmError, match="EINVAL"):
        mm.mprotect(m.memory, 0, 512, 2)


# -- fork and soft-dirty


@pytest.mark.parametrize("share", [mm.fork, mm.clear_refs])
def test_after_fork_or_soft_dirty_a_read_maps_825_and_a_write_needs_one_fault_and_no_unmap(share):
    m = Machine(flags=LOG)
    m.write(3)
    m.dirty()
    assert m.flushes_of(share, [m.memory]) == 1
    assert m.leafs() == {}
    m.read(3)
    assert (m.leafs(), m.dirty()) == ({3: "825"}, set())
    before = m.flushes()
    assert m.write(3) == ONE_FAULT
    assert (m.leafs(), m.dirty(), m.flushes()) == ({3: "e67"}, {3}, before + 1)  # the one flush is the harvest's


@pytest.mark.parametrize("share", [mm.fork, mm.clear_refs])
def test_after_fork_or_soft_dirty_thp_stays_huge(share):
    m = Machine("thp")
    m.write(0)
    share([m.memory])
    assert m.memory.huge_bytes == 4 << 20
    m.read(0)
    assert m.leafs() == {0: "8a5"}
    assert m.write(0) == ONE_FAULT
    assert (m.leafs(), m.flushes()) == ({0: "ee7"}, 1)


def test_fork_leaves_shared_memory_and_zero_pages_as_they_are():
    shared, private = Machine("shm"), Machine(populate=False)
    shared.write(3)
    assert shared.flushes_of(mm.fork, [shared.memory]) == 0
    assert shared.leafs() == {3: "e67"}
    private.read(3)
    mm.fork([private.memory])
    private.read(3)
    assert private.write(3) == {"pf_taken": 2, "pf_fixed": 1}


def test_fork_flushes_once_for_each_mapping_that_had_sptes_and_soft_dirty_once_for_all():
    for share, flushes in ((mm.fork, 3), (mm.clear_refs, 1)):
        m = Machine()
        other = spte.Backing("4k", PAGE, populate=True)
        untouched = spte.Backing("4k", PAGE, populate=True)
        for slot, backing in ((1, other), (2, untouched)):
            m.vm.set_memory_region(slot, slot << 30, PAGE, backing)
        mm.mprotect(m.memory, 0, 512, READ_ONLY)  # two mappings now
        m.read(0, 600)
        m.vm.vcpus[0].write([1 << 18])
        assert m.flushes_of(share, [m.memory, other, untouched]) == flushes
        assert m.leafs() == {}


def test_soft_dirty_does_not_write_protect_hugetlb():
    m = Machine("hugetlb2m")
    m.write(0)
    assert m.flushes_of(mm.clear_refs, [m.memory]) == 1
    m.read(0)
    assert m.leafs() == {0: "ee7"}


# -- writes from elsewhere


def test_a_host_write_is_never_dirty_and_unmaps_only_a_zero_page():
    m = Machine(populate=False, flags=LOG)
    m.read(0)
    m.write(1)
    m.dirty()
    assert m.flushes_of(m.memory.write, 1, 2) == 0
    assert m.flushes_of(m.memory.write, 0, 1) == 1
    assert m.leafs() == {1: "e65"}
    assert m.dirty() == set()
    m.read(0, 2)
    assert m.leafs() == {0: "e67", 1: "e65", 2: "e67"}


def test_a_host_write_makes_a_write_protected_page_writable_without_an_unmap():
    m = Machine()
    mm.fork([m.memory])
    m.read(0)
    assert m.flushes_of(m.memory.write, 0, 1) == 0
    assert m.leafs() == {0: "825"}
    assert m.write(0) == ONE_FAULT


def test_a_kernel_write_is_dirty_without_an_spte():
    m = Machine(flags=LOG)
    m.vm.kernel_write(BASE + 3)
    assert (m.leafs(), m.dirty(), m.access("read")) == ({}, {3}, {})


def test_a_kernel_write_to_a_readonly_slot_a_hole_or_a_protected_page_marks_nothing():
    m = Machine(flags=LOG)
    readonly = spte.Backing("4k", PAGE, populate=True)
    m.vm.set_memory_region(1, 1 << 30, PAGE, readonly, flags=LOG | RO)
    mm.mprotect(m.memory, 3, 1, READ_ONLY)
    for gfn in (BASE + 3, 1 << 18, 1 << 20):
        m.vm.kernel_write(gfn)
    assert m.dirty() == set()
    assert not m.vm.get_dirty_log(1).any()


# -- aging and prefault without A/D bits


@pytest.mark.parametrize(("policy", "flushes"), [("6.1", 1), ("6.12", 1), ("6.13", 0)])
@pytest.mark.parametrize("platform", ["ept-pml", "ept-noad", "npt"])
def test_aging_flushes_for_each_accessed_page_up_to_6_12(platform, policy, flushes):
    m = Machine(platform=platform, policy=policy)
    m.write(0, 1)
    assert m.flushes_of(mm.madvise, m.memory, 0, 4, mm.PAGEOUT, ages=True) == 2 * flushes
    assert m.flushes_of(mm.madvise, m.memory, 0, 4, mm.PAGEOUT, ages=True) == 0
    taken = {"pf_taken": 1, "pf_fixed": 1, "pf_fast": 1} if platform == "ept-noad" else {}
    assert m.read(0) == taken
    assert m.flushes_of(mm.madvise, m.memory, 0, 4, mm.PAGEOUT, ages=True) == flushes


def test_a_prefault_without_ad_bits_leaves_what_may_be_read_as_it_is():
    m = Machine(platform="ept-noad", flags=LOG)
    m.write(0)
    m.dirty()
    before = m.leafs()
    assert m.prefault(0) == {"pf_fast": 1}
    assert (m.leafs(), m.dirty()) == (before, set())


def test_a_prefault_with_ad_bits_makes_a_write_protected_page_writable_and_dirty():
    m = Machine(flags=LOG)
    m.write(0)
    m.dirty()
    assert m.prefault(0) == {}
    assert (m.leafs(), m.dirty()) == ({0: "e47"}, {0})


# -- a fault that the host has to help with, and a full ring


def test_a_page_copied_in_a_fault_that_fills_the_ring_is_mapped_after_the_exit():
    """448 entries are the soft limit: the drain reaches it at the fault, and the entry that would try that again exits."""
    vm = spte.VM("ept-pml", ring_bytes=1024 * 16)
    full, fresh = spte.Backing("4k", 512 * PAGE, populate=True), spte.Backing("4k", PAGE)
    other = spte.Backing("4k", PAGE)
    vm.set_memory_region(0, 0, 512 * PAGE, full)
    vm.set_memory_region(1, 1 << 30, PAGE, fresh)
    vm.vcpus[0].read([1 << 18])  # the host maps its zero page
    vm.set_memory_region(2, 1 << 31, PAGE, other)
    vm.set_memory_region(2, 0, 0)  # every SPTE goes
    vm.vcpus[0].write(range(512))
    for slot, gpa, backing in ((0, 0, full), (1, 1 << 30, fresh)):
        vm.set_memory_region(slot, gpa, backing.size, backing, flags=LOG)
    stop = vm.vcpus[0].write([*range(448), 1 << 18])
    assert (stop.reason, stop.index) == ("dirty_ring_full", 448)
    ring = vm.vcpus[0].ring
    assert (ring["flags"] == 1).sum() == 448
    assert (vm.stats()["vcpu0"]["pf_taken"], vm.stats()["vcpu0"]["pf_fixed"]) == (514, 513)
    ring["flags"][:448] = 3
    assert vm.reset_dirty_rings() == 448
    assert vm.vcpus[0].write([1 << 18]) is None
    assert ring["slot"][448] == 1
    assert (vm.stats()["vcpu0"]["pf_taken"], vm.stats()["vcpu0"]["pf_fixed"]) == (515, 514)
