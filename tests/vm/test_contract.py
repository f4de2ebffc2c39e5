"""The contract of dirty logging: at least once, in a steady state exactly once; and its rules C, L, M and D."""

import dataclasses
import random

import numpy as np
import pytest
from conftest import LOG, PAGE, PLATFORMS, PML_PLATFORMS, TDP_PLATFORMS, VERSIONS, WP_PLATFORMS, Guest, bitmap_of, has_rings, pages_of

import spte
from spte._numba import jit as _jit

MODES = ("get", "manual 1", "manual 3", "ring")
KINDS = ("4k", "thp", "hugetlb2m", "shm")
W, LARGE = 1 << 1, 1 << 7
EPT_BITS = {"d": 1 << 9, "mw": 1 << 58}
NPT_BITS = {"d": 1 << 6, "mw": 1 << 10}
# Pages of a batch, fewer than that, and harvests in a row. Plain Python is slow: there still batches over both huge pages, and a harvest
# of what the one before has armed.
MOST_PAGES, HARVESTS = (60, 2) if _jit.PLAIN else (200, 4)


def bit(platform, name):
    return (EPT_BITS if platform.startswith("ept") else NPT_BITS)[name]


def is_armed(platform, flags):
    return not flags & W or (platform in PML_PLATFORMS and not flags & bit(platform, "d"))


def random_pages(rng, npages=1024):
    return rng.sample(range(npages), rng.randrange(1, MOST_PAGES))


# -- C1, C2: at least once, and in a steady state exactly once


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_written_page_is_reported_at_least_once(platform, policy, kind, mode, eager):
    if mode == "manual 3" and kind == "shm":
        kind = "4k"
    rng = random.Random(f"{platform} {policy} {kind} {mode}")
    guest = Guest(platform, policy, mode=mode, kind=kind, populate=False)
    guest.vm.set_param("eager_page_split", eager)
    guest.write(random_pages(rng))
    guest.set_flags(LOG)
    for _ in range(HARVESTS):
        written = random_pages(rng)
        guest.write(written)
        guest.read(random_pages(rng))
        assert set(written) <= set(guest.harvest())
        guest.vm.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [kind if kind in ("4k", "thp") else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS])
def test_in_a_steady_state_each_written_page_is_reported_exactly_once(platform, policy, kind, mode):
    """Steady: every leaf is 4 KiB and present, no page was mended since the last harvest but not yet logged."""
    rng = random.Random(f"{platform} {policy} {kind} {mode}")
    guest = Guest(platform, policy, mode=mode, kind=kind)
    guest.set_flags(LOG)
    for _ in range(2):
        guest.write(range(guest.npages))
        guest.harvest()
    guest.harvest()
    for _ in range(HARVESTS):
        written = random_pages(rng)
        guest.write(written)
        guest.write(written)
        guest.read(range(guest.npages))
        assert sorted(guest.harvest()) == sorted(written)
    assert list(guest.harvest()) == []


def test_a_read_of_an_unmapped_page_of_a_logging_slot_is_reported(platform, policy):
    guest = Guest(platform, policy, kind="4k")
    guest.set_flags(LOG)
    guest.read([5])
    assert guest.harvest() == [5]
    guest.read([5])
    assert guest.harvest() == []


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("policy", "mode"), [(p, m) for p in VERSIONS for m in MODES if m != "ring" or has_rings(p)])
def test_every_policy_keeps_the_contract(platform, policy, mode, eager):
    rng = random.Random(f"{platform} {policy} {mode}")
    guest = Guest(platform, policy, mode=mode, kind="thp", npages=1100)
    guest.vm.set_param("eager_page_split", eager)
    for _ in range(2):
        guest.write(random_pages(rng))
        guest.set_flags(LOG)
        guest.vm.check()
        for _ in range(2):
            written = random_pages(rng)
            guest.write(written)
            guest.read(random_pages(rng))
            assert set(written) <= set(guest.harvest())
            guest.vm.check()
        guest.set_flags(0)
        guest.vm.check()


# -- C3 to C7


def test_a_slot_that_does_not_log_reports_nothing(platform):
    vm = spte.VM(platform)
    memory = [spte.Backing("4k", 64 * PAGE, populate=True) for _ in range(2)]
    for sid, backing in enumerate(memory):
        vm.set_memory_region(sid, sid << 22, 64 * PAGE, backing, flags=LOG)
    vm.vcpus[0].write(np.arange(64))
    vm.vcpus[0].write(np.arange(1024, 1088))
    vm.get_dirty_log(0)
    vm.get_dirty_log(1)
    vm.set_memory_region(1, 1 << 22, 64 * PAGE, memory[1], flags=0)
    vm.vcpus[0].write(np.arange(1024, 1088))  # D is clear: with PML these are logged, and dropped when drained
    with pytest.raises(spte.KvmError, match="ENOENT"):
        vm.get_dirty_log(1)
    assert pages_of(vm.get_dirty_log(0)) == set()


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 500, 1001])
@pytest.mark.parametrize("mode", ["get", "manual 1", "manual 3"])
def test_bits_beyond_the_slot_are_never_set(platform, mode, npages):
    guest = Guest(platform, mode=mode, npages=npages)
    guest.set_flags(LOG)
    guest.write(range(npages))
    bitmap = guest.vm.get_dirty_log(0)
    assert len(bitmap) == -(-npages // 64)
    assert pages_of(bitmap) == set(range(npages))


@pytest.mark.parametrize("mode", ["manual 1", "manual 3"])
def test_get_changes_nothing_in_manual_mode(platform, policy, mode):
    guest = Guest(platform, policy, mode=mode, kind="thp")
    guest.write(range(600))
    guest.set_flags(LOG)
    guest.write([1, 7, 513])
    before = guest.leafs(), guest.vm.stats()
    first = pages_of(guest.vm.get_dirty_log(0))
    assert (guest.leafs(), guest.vm.stats()) == before
    guest.write([9])
    assert first <= pages_of(guest.vm.get_dirty_log(0))


@pytest.mark.parametrize("mode", ["get", "manual 1"])
def test_clear_touches_only_what_was_asked_for_and_was_dirty(platform, policy, mode):
    guest = Guest(platform, policy, mode=mode)
    guest.write(range(guest.npages))
    guest.set_flags(LOG)
    guest.write(range(0, 256, 2))
    before, asked = guest.leafs(), set(range(64, 140))
    guest.vm.clear_dirty_log(0, 64, 64, bitmap_of({p - 64 for p in asked if p < 128}, 64))
    cleared = {p for p in range(64, 128) if p % 2 == 0}
    after = guest.leafs()
    changed = {gfn - guest.base for (_, gfn), flags in after.items() if before[1, gfn] != flags}
    assert changed == cleared
    assert all(is_armed(platform, after[1, guest.base + p]) for p in cleared)
    live = {f + i for f, n in guest.vm.slots()[0]["kbitmap"] for i in range(n)}
    assert live == set(range(0, 256, 2)) - cleared


def test_a_ring_keeps_the_order_of_pushes_and_skips_nothing(platform, policy):
    guest = Guest(platform, policy, mode="ring")
    guest.write(range(guest.npages))
    guest.set_flags(LOG)
    order = random.Random(3).sample(range(guest.npages), 100)
    guest.write(order)
    ring = guest.vm.vcpus[0].ring
    used = int(np.count_nonzero(ring["flags"]))
    assert used == 100
    newest_first = platform in PML_PLATFORMS
    assert ring["offset"][:100].tolist() == (order[::-1] if newest_first else order)
    ring["flags"][:40] = 3
    ring["flags"][60:80] = 3  # behind entries that were not harvested: out of reach of the reset
    assert guest.vm.reset_dirty_rings() == 40
    assert not ring["flags"][:40].any()
    assert (ring["flags"][40:60] == 1).all()
    guest.vm.check()


# -- L: the state of the leaves while a slot logs


@pytest.mark.parametrize("eager", [True, False])
def test_no_huge_leaf_is_writable_while_a_slot_logs(platform, policy, eager):
    guest = Guest(platform, policy, kind="thp", npages=2048)
    guest.vm.set_param("eager_page_split", eager)
    guest.write(range(0, 2048, 100))
    guest.set_flags(LOG)
    rng = random.Random(1)
    huge = guest.stats("pages_2m", "vm")
    assert huge == (0 if eager and platform in TDP_PLATFORMS else 4)
    for _ in range(5):
        assert not [k for k, flags in guest.leafs().items() if k[0] > 1 and flags & W]
        guest.write(rng.sample(range(2048), 2))
        guest.read(rng.sample(range(2048), 2))
        assert guest.stats("pages_2m", "vm") <= huge
        huge = guest.stats("pages_2m", "vm")


@pytest.mark.parametrize("platform", WP_PLATFORMS)
def test_a_writable_leaf_of_a_logging_slot_has_its_bit(platform, policy):
    guest = Guest(platform, policy, kind="thp", mode="manual 1")
    guest.write(range(0, 900, 7))
    guest.set_flags(LOG)
    rng = random.Random(2)
    for _ in range(4):
        guest.write(random_pages(rng))
        live = pages_of(guest.vm.get_dirty_log(0))
        assert {g - guest.base for (_, g), flags in guest.leafs().items() if flags & W} <= live
        guest.vm.clear_dirty_log(0, 0, 512, bitmap_of({p for p in live if p < 512}, 512))
        assert {g - guest.base for (_, g), flags in guest.leafs().items() if flags & W} == {p for p in live if p >= 512}


@pytest.mark.parametrize("platform", PML_PLATFORMS)
def test_a_leaf_whose_bit_is_clear_is_not_both_writable_and_dirty_under_pml(platform, policy):
    guest = Guest(platform, policy, kind="thp", mode="manual 1")
    guest.write(range(0, 900, 7))
    guest.set_flags(LOG)
    rng = random.Random(2)
    for _ in range(4):
        guest.write(random_pages(rng))
        live = pages_of(guest.vm.get_dirty_log(0))
        guest.vm.clear_dirty_log(0, 0, 512, bitmap_of({p for p in live if p < 512}, 512))
        live = {p for p in live if p >= 512}
        assert {g - guest.base for (_, g), flags in guest.leafs().items() if not is_armed(platform, flags)} == live


@pytest.mark.parametrize("platform", WP_PLATFORMS)
def test_a_leaf_left_write_protected_after_logging_costs_one_fast_fault(platform, policy):
    guest = Guest(platform, policy, kind="4k")
    guest.write([3])
    guest.set_flags(LOG)
    guest.set_flags(0)
    before = guest.stats("pf_taken"), guest.stats("pf_fast")
    guest.write([3, 3])
    assert (guest.stats("pf_taken"), guest.stats("pf_fast")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("kind", ["4k", "thp"])
def test_enabling_with_initially_set_touches_no_spte(platform, policy, kind):
    guest = Guest(platform, policy, kind=kind, mode="manual 3")
    guest.write(range(guest.npages))
    before = guest.leafs(), guest.vm.counters()["sptes_written"], guest.stats("remote_tlb_flush_requests", "vm")
    guest.set_flags(LOG)
    after = guest.leafs(), guest.vm.counters()["sptes_written"], guest.stats("remote_tlb_flush_requests", "vm")
    assert after == before
    assert pages_of(guest.vm.get_dirty_log(0)) == set(range(guest.npages))


def by_page(guest):
    """{page: (level, flags but for LARGE) of the leaf that maps it}."""
    pages = {1: 1, 2: 512}
    return {gfn - guest.base + i: (lv, flags & ~LARGE) for (lv, gfn), flags in guest.leafs().items() for i in range(pages[lv])}


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("mode", ["get", "manual 1", "manual 3"])
def test_a_harvested_page_is_armed_and_its_neighbours_are_not_touched(platform, policy, mode, eager):
    guest = Guest(platform, policy, kind="thp", mode=mode)
    guest.vm.set_param("eager_page_split", eager)
    guest.write(range(guest.npages))
    guest.set_flags(LOG)
    guest.write(range(100, 300))
    before = by_page(guest)
    if mode == "get":
        harvested = pages_of(guest.vm.get_dirty_log(0))
        assert harvested == set(range(100, 300))
    else:
        harvested = set(range(128, 200))
        guest.vm.clear_dirty_log(0, 128, 128, bitmap_of({p - 128 for p in harvested}, 128))
    after, armed = by_page(guest), bit(platform, "d") if platform in PML_PLATFORMS else W
    assert after.keys() == before.keys() >= harvested
    for page, (level, flags) in after.items():
        taken = armed if page in harvested else 0
        if level == 2 and page < 512:  # one leaf for the harvested pages and their neighbours
            taken = W | bit(platform, "mw")
        assert flags == before[page][1] & ~taken, page


# -- M: PML


@pytest.mark.parametrize("platform", PML_PLATFORMS)
def test_pml_runs_only_while_a_slot_logs(platform):
    guest = Guest(platform)
    guest.write(range(300))
    entries = lambda: guest.vm.counters()["pml_entries"]  # noqa: E731
    assert entries() == 0
    guest.set_flags(LOG)
    guest.write(range(300))
    assert entries() == 300
    guest.vm.get_dirty_log(0)
    guest.set_flags(0)
    guest.write(range(300))
    assert entries() == 300


def test_close_returns_the_number_of_logging_slots(platform):
    vm = spte.VM(platform)
    for sid, flags in enumerate((LOG, 0, LOG | 2, LOG)):
        vm.set_memory_region(sid, sid << 24, PAGE, spte.Backing("4k", PAGE), flags=flags)
    vm.set_memory_region(3, 0, 0)
    vm.set_memory_region((1 << 16) | 0, 0, PAGE, spte.Backing("4k", PAGE), flags=LOG)
    assert vm.close() == 3


@pytest.mark.parametrize(("writes", "full"), [(512, 0), (513, 1), (1024, 1), (1025, 2), (2048, 3)])
@pytest.mark.parametrize("platform", PML_PLATFORMS)
def test_the_buffer_is_full_at_the_513th_need(platform, writes, full):
    guest = Guest(platform, npages=2048)
    guest.write(range(2048))
    guest.set_flags(LOG)
    guest.write(range(writes))
    counters = guest.vm.counters()
    assert (counters["pml_entries"], counters["pml_full"]) == (writes, full)
    assert guest.harvest() == list(range(writes))


@pytest.mark.parametrize("platform", WP_PLATFORMS)
def test_without_pml_nothing_is_ever_logged_by_hardware(platform):
    guest = Guest(platform, npages=2048)
    guest.write(range(2048))
    guest.set_flags(LOG)
    guest.write(range(2048))
    counters = guest.vm.counters()
    assert (counters["pml_entries"], counters["pml_full"]) == (0, 0)


def test_disabling_writes_no_spte_where_nothing_can_collapse(platform, policy):
    guest = Guest(platform, policy, kind="4k")
    guest.write(range(guest.npages))
    guest.set_flags(LOG)
    guest.write(range(100))
    before = guest.leafs(), guest.vm.counters()["sptes_written"]
    guest.set_flags(0)
    assert (guest.leafs(), guest.vm.counters()["sptes_written"]) == before


# -- D: differential checks


def harvests(platform, policy="6.12", *, mode="get", kind="thp", eager=True, seed=0, reads=False):
    """The pages reported by each harvest of one fixed workload."""
    rng = random.Random(seed)
    guest = Guest(platform, policy, mode=mode, kind=kind)
    guest.vm.set_param("eager_page_split", eager)
    guest.write(range(guest.npages))
    guest.set_flags(LOG)
    if mode == "manual 3":
        guest.harvest()
    found = []
    for _ in range(4):
        guest.write(random_pages(rng))
        if reads:
            guest.read(random_pages(rng))
        found.append(sorted(set(guest.harvest())))
    return found


def writes_of(seed=0):
    rng = random.Random(seed)
    return [sorted(random_pages(rng)) for _ in range(4)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_platform_reports_the_pages_that_were_written(platform, policy, kind, mode):
    assert harvests(platform, policy, mode=mode, kind=kind) == writes_of()


@pytest.mark.parametrize("mode", MODES)
def test_eager_split_changes_the_faults_and_not_the_reports(policy, mode):
    """Write-protect kinds; under PML a leaf mended by a fast fault may report again in the next harvest."""
    for platform in WP_PLATFORMS:
        assert harvests(platform, policy, mode=mode, eager=False) == harvests(platform, policy, mode=mode, eager=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bitmap_and_ring_report_the_same_pages(platform, policy, kind):
    assert harvests(platform, policy, mode="ring", kind=kind) == harvests(platform, policy, mode="get", kind=kind)


@pytest.mark.parametrize("mode", ["manual 1", "manual 3"])
def test_one_clear_of_64_pages_equals_64_clears_of_one_page(platform, policy, mode):
    guests = [Guest(platform, policy, kind="thp", mode=mode) for _ in range(2)]
    for guest in guests:
        guest.write(range(guest.npages))
        guest.set_flags(LOG)
        guest.write(range(64, 192))
    guests[0].vm.clear_dirty_log(0, 64, 64, bitmap_of(range(64), 64))
    for page in range(64):
        guests[1].vm.clear_dirty_log(0, 64, 64, bitmap_of([page], 64))
    assert guests[0].leafs() == guests[1].leafs()
    assert guests[0].vm.slots() == guests[1].vm.slots()


def test_an_exchanged_decision_changes_costs_and_not_reports(platform_that_splits_in_place):
    lazy = dataclasses.replace(spte.Policy.named("6.12"), eager_page_split=False)
    guests = [Guest(platform_that_splits_in_place, p, kind="thp") for p in ("6.12", lazy)]
    for guest in guests:
        guest.write(range(guest.npages))
        guest.set_flags(LOG)
        guest.write(range(10))
    assert [g.stats("pf_taken") > 2 for g in guests] == [platform_that_splits_in_place in WP_PLATFORMS, True]
    assert guests[0].harvest() == guests[1].harvest() == list(range(10))


def test_every_platform_that_is_offered_by_name_is_held_to_the_contract():
    assert spte.platform.NAMES == PLATFORMS
