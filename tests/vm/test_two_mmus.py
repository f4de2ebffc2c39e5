"""The TDP MMU and the shadow MMU report the same pages for the same writes; where they are known to differ stands here, a test each.

The differences are in what is mapped without being written: read faults and prefetched neighbours (recordings z1_random_s2,
24-thp-long-rounds, c3_manual3_thp_eagerN).
"""

import random
from functools import cache

import pytest
from conftest import LOG, PML_PLATFORMS, TDP_PLATFORMS, Guest

from spte._numba import jit as _jit

MODES = ("get", "manual 1", "manual 3", "ring")
KINDS = ("4k", "thp", "hugetlb2m", "shm")
RMAP_PLATFORMS = (*(name + "-rmap" for name in TDP_PLATFORMS), "shadow")
WITH_ACCESSED_BITS = [name for name in RMAP_PLATFORMS if name != "ept-noad-rmap"]

# Pages that are mapped before logging, and writes of a vCPU between two harvests. Plain Python is slow: there still both huge pages,
# a run over the end of a table, and with small pages some that no entry maps.
MAPPED, WRITES = (600, 40) if _jit.PLAIN else (1024, 150)


def logging_guest(platform, policy="6.12", *, touched, eager=False, kind="thp", mode="get"):
    """A guest that has written `touched` and logs since."""
    guest = Guest(platform, policy, kind=kind, mode=mode)
    guest.vm.set_param("eager_page_split", eager)
    guest.write(touched)
    guest.set_flags(LOG)
    return guest


@cache  # the shadow MMU's are what those of every other platform are held to
def harvests_of(platform, policy, kind, mode, eager):
    """Pages of two vCPUs' writes, over two periods of logging; each harvest is one set."""
    rng = random.Random(f"{kind} {mode}")
    guest = Guest(platform, policy, mode=mode, kind=kind, vcpus=2)
    guest.vm.set_param("eager_page_split", eager)
    harvests = []
    for _ in range(2):
        guest.write(range(MAPPED))
        guest.set_flags(LOG)
        harvests.append(set(guest.harvest()))
        for _ in range(3):
            for v in range(2):
                guest.write(rng.sample(range(guest.npages), WRITES), v)
            harvests.append(set(guest.harvest()))
        guest.set_flags(0)
    return harvests


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_mmus_report_the_same_pages_for_the_same_writes(platform_that_splits_in_place, policy, kind, mode, eager):
    platforms = (platform_that_splits_in_place, platform_that_splits_in_place + "-rmap", "shadow")
    found = [harvests_of(platform, policy, kind, mode, eager) for platform in platforms]
    if platform_that_splits_in_place in PML_PLATFORMS and not eager:
        # A leaf of a split made writable by a fast fault has D clear, and its page may be in the next harvest again (C2).
        assert all(ref <= got for got, ref in zip(found[0], found[2], strict=True))
    else:
        assert found[0] == found[2]
    assert found[1] == found[2]


# -- known differences


@pytest.mark.parametrize("platform", PML_PLATFORMS)
def test_under_pml_a_mended_leaf_may_report_one_write_twice_which_the_shadow_mmu_has_none_of(platform):
    """The fast fault marks the page and leaves D clear; the write then sets D and is logged too (over-report, C2).

    The shadow MMU has dropped the huge leaf: each page comes by a slow fault, with D.
    """
    guest = logging_guest(platform, touched=[0], mode="ring")
    guest.write([0, 1])
    assert sorted(guest.harvest()) == ([0, 1, 1] if platform in TDP_PLATFORMS else [0, 1])


def test_enabling_splits_huge_leaves_under_the_tdp_mmu_and_leaves_them_whole_under_the_shadow_mmu(platform, policy):
    guest = logging_guest(platform, policy, touched=range(0, 1024, 100), eager=True)
    assert guest.stats("pages_2m", "vm") == (0 if platform in TDP_PLATFORMS else 2)


@pytest.mark.parametrize(("policy", "splits"), [("6.1", False), ("6.12", True)])
def test_a_write_below_a_huge_leaf_keeps_its_neighbours_mapped_only_where_it_is_split_in_place(platform, policy, splits):
    """Where it is dropped, a later read of a neighbour is a fault, which reports it."""
    guest = logging_guest(platform, policy, touched=[0])
    guest.write([1])
    guest.read([2])
    kept = splits and platform in TDP_PLATFORMS
    assert guest.stats("pages_4k", "vm") == (512 if kept else 2)
    assert guest.harvest() == ([1] if kept else [1, 2])


@pytest.mark.parametrize("platform", WITH_ACCESSED_BITS)
def test_the_shadow_mmu_maps_eight_neighbours_of_which_a_read_is_not_reported_later(platform, policy):
    guest = logging_guest(platform, policy, touched=[17], kind="4k")
    assert guest.stats("pages_4k", "vm") == 8
    guest.read(range(16, 24))
    assert guest.harvest() == []
    guest.read([24])
    assert guest.harvest() == [24]


@pytest.mark.parametrize("platform", [*TDP_PLATFORMS, "ept-noad-rmap"])
def test_without_prefetch_each_read_of_a_neighbour_is_reported(platform, policy):
    guest = logging_guest(platform, policy, touched=[17], kind="4k")
    guest.read(range(16, 20))
    assert guest.harvest() == [16, 18, 19]


@pytest.mark.parametrize("platform", RMAP_PLATFORMS)
def test_a_slot_that_logs_has_no_prefetch(platform, policy):
    guest = Guest(platform, policy)
    guest.set_flags(LOG)
    guest.write([17])
    assert guest.stats("pages_4k", "vm") == 1
    assert guest.harvest() == [17]


@pytest.mark.parametrize("platform", RMAP_PLATFORMS)
def test_a_delete_flushes_if_a_page_was_valid_and_again_when_the_last_vcpu_lets_go_of_the_old_root(platform, policy):
    guest = Guest(platform, policy, vcpus=2)
    flushes = lambda: guest.stats("remote_tlb_flush_requests", "vm")  # noqa: E731
    for v in range(2):
        guest.write([0], v)
    before = flushes()
    for want in (1, 1):
        guest.vm.set_memory_region(0, 0, 0)
        guest.set_flags(0)
        assert flushes() - before == want
    guest.write([0], 0)
    assert flushes() - before == 1
    guest.write([0], 1)
    assert flushes() - before == 2


def test_disabling_drops_small_leaves_with_one_flush_under_the_shadow_mmu_and_one_a_table_under_the_tdp_mmu(platform, policy):
    guest = logging_guest(platform, policy, touched=[0])
    guest.write([0, 1, 512, 513])
    before = guest.stats("remote_tlb_flush_requests", "vm")
    guest.set_flags(0)
    assert guest.stats("pages_4k", "vm") == 0
    assert guest.stats("remote_tlb_flush_requests", "vm") - before == (2 if platform in TDP_PLATFORMS else 1)
