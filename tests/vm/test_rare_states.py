"""States that few programs reach: modes that change under a slot that logs, NX and access tracking at once, older versions' CLEAR."""

import numpy as np
import pytest
from conftest import LOG, PAGE, Guest, bitmap_of

import spte
from spte import mm

X, W = 1 << 2, 1 << 1
PARKED_RX = 0b101 << 54
MMU_WRITABLE = 1 << 10


@pytest.mark.parametrize("platform", ["npt", "ept-pml"])
def test_a_slot_that_began_initially_set_may_be_left_writable_when_the_mode_changes(platform):
    """CLEAR in another mode passes over huge leaves: KVM loses writes there, and no invariant may complain."""
    guest = Guest(platform, kind="thp", mode="manual 3")
    guest.vm.set_param("eager_page_split", False)
    guest.write([0, 512])
    guest.set_flags(LOG)
    guest.vm.enable_cap("manual_dirty_log_protect2", 1)
    guest.vm.clear_dirty_log(0, 0, 64, bitmap_of([0], 64))
    guest.vm.check()
    guest.vm.enable_cap("manual_dirty_log_protect2", 3)
    guest.vm.set_param("eager_page_split", True)
    guest.vm.clear_dirty_log(0, 0, 64, bitmap_of([1], 64))
    guest.vm.check()
    assert guest.leafs()[1, guest.base] & W
    guest.set_flags(0)
    guest.vm.enable_cap("manual_dirty_log_protect2", 0)
    guest.set_flags(LOG)
    guest.vm.check()
    assert not any(flags & W and level > 1 for (level, _), flags in guest.leafs().items())


@pytest.mark.parametrize("policy", ["6.12", "6.13"])
def test_a_parked_huge_leaf_that_nx_splits_gives_parked_executable_children(policy):
    guest = Guest("ept-noad", policy, kind="thp")
    guest.vm.set_param("nx_huge_pages", True)
    guest.vm.vcpus[0].prefault(guest.base * PAGE, PAGE)
    guest.vm.vcpus[0].exec([guest.base + 7])
    neighbour = guest.leafs()[1, guest.base]
    assert neighbour & PARKED_RX == PARKED_RX
    assert not neighbour & (X | 1)
    guest.vm.vcpus[0].exec([guest.base])
    assert guest.leafs()[1, guest.base] & X
    assert guest.stats("pf_spurious") == 0


def test_a_huge_leaf_recovered_from_a_parked_one_is_not_executable_under_nx():
    guest = Guest("ept-noad", "6.13", kind="thp")
    guest.vm.set_param("nx_huge_pages", True)
    guest.set_flags(LOG)
    guest.write([0])
    mm.madvise(guest.memory, 0, 1, mm.PAGEOUT, ages=True)  # splits the host's block, which drops the leaf
    guest.write([512])
    guest.vm.mmu.age_gfns(guest.vm.memslots.find(0), guest.base + 512, guest.base + 513, clear=True)
    guest.set_flags(0)
    assert guest.leafs()[2, guest.base + 512] & (X | X << 54) == 0
    guest.read([512])
    guest.vm.check()


@pytest.mark.parametrize(("policy", "kept"), [("5.11", True), ("series", True), ("5.12", True), ("6.1", False), ("6.12", False)])
def test_clear_takes_mmu_writable_from_huge_leaves_since_5_14(policy, kept):
    """Before, enabling with initially-set has write-protected them already, and CLEAR passes over them."""
    guest = Guest("npt", policy, kind="thp", mode="manual 3")
    if policy.startswith("6"):
        guest.vm.set_param("eager_page_split", False)
    guest.write([0])
    guest.set_flags(LOG)
    guest.vm.clear_dirty_log(0, 0, 64, bitmap_of([3], 64))
    assert bool(guest.leafs()[2, guest.base] & MMU_WRITABLE) == kept
    assert not guest.leafs()[2, guest.base] & W


@pytest.mark.parametrize("share", [None, mm.fork])
def test_before_5_12_disabling_zaps_what_lies_in_huge_pages_of_the_host_write_protected_or_not(share):
    guest = Guest("npt", "5.11", kind="thp")
    if share:
        share([guest.memory])
    guest.set_flags(LOG)
    guest.read([0])
    guest.set_flags(0)
    assert guest.leafs() == {}


def test_slots_of_the_second_address_space_count_as_logging_and_stay_clean():
    guest = Guest("ept-pml")
    vm, smm = guest.vm, spte.Backing("4k", PAGE, populate=True)
    vm.set_memory_region(1 << 16, guest.base * PAGE, PAGE, smm, flags=LOG)
    guest.write([0])
    guest.write([0])
    assert vm.nr_memslots_dirty_logging == 1
    assert not vm.get_dirty_log(1 << 16).any()
    vm.kernel_write(guest.base)
    assert not np.any(vm.get_dirty_log(1 << 16))
    vm.check()


@pytest.mark.parametrize("platform", ["ept-noad", "ept-noad-rmap"])
def test_aging_without_accessed_bits_parks_what_may_be_read_and_its_next_write_is_a_fast_fault(platform):
    guest = Guest(platform)
    guest.write([0])
    mm.madvise(guest.memory, 0, 1, mm.PAGEOUT, ages=True)
    assert guest.leafs()[1, guest.base] & (PARKED_RX | W | 1) == PARKED_RX
    before = guest.stats("pf_fast")
    guest.write([0])
    assert guest.leafs()[1, guest.base] & W
    assert guest.stats("pf_fast") == before + 1
