"""The contract for guests that run guests: what L1 or L2 writes, by whatever address, is reported under L1's gfn."""

import random

import pytest
from conftest import LOG, PAGE, PLATFORMS, pages_of
from programs.nest import L2, TABLES_GFN, Nest

import spte
from spte import mm
from spte._numba import jit as _jit

MODES = ("get", "manual 1", "manual 3", "ring")
NESTED = [name for name in PLATFORMS if name != "shadow"]
VIEWS = 3
HARVESTS = 2 if _jit.PLAIN else 3  # plain Python is slow: there still a harvest of what the one before has armed


@pytest.fixture(params=NESTED)
def nested(request):
    """A platform on which L1 gives L2 tables of their own."""
    return request.param


def flushes(nest):
    return nest.stats("remote_tlb_flush_requests", "vm")


# -- at least once, and exactly once in a steady state


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["4k", "thp", "hugetlb2m"])
def test_each_page_written_by_l1_or_l2_is_reported_at_least_once(platform, kind, mode, eager, level):
    rng = random.Random(f"{platform} {kind} {mode} {level}")
    nest = Nest(platform, kind=kind, mode=mode, level=level, views=VIEWS, vcpus=2)
    nest.vm.set_param("eager_page_split", eager)
    nest.enter(0)
    nest.write_as_l2(rng.sample(range(1024), 20))
    nest.write(rng.sample(range(1024), 20), v=1)
    nest.set_flags(LOG)
    for _ in range(HARVESTS):
        by_l1, *by_l2 = (rng.sample(range(1024), 15) for _ in range(1 + VIEWS))
        for view, pages in enumerate(by_l2):
            nest.write_as_l2(pages, view=view)
        nest.write(by_l1, v=1)
        nest.read_as_l2(rng.sample(range(1024), 5))
        nest.vm.check()
        assert set(by_l1).union(*by_l2) <= set(nest.harvest())
        nest.vm.check()


@pytest.mark.parametrize("mode", MODES)
def test_in_a_steady_state_only_what_was_written_by_any_alias_is_reported(platform, mode):
    nest = Nest(platform, mode=mode, npages=70, views=VIEWS, vcpus=2)
    nest.enter(0)
    nest.set_flags(LOG)
    for _ in range(2):
        nest.write(range(70), v=1)
        for view in range(VIEWS):
            nest.write_as_l2(range(70), view=view)
        nest.harvest()
    for view in range(VIEWS):
        nest.write_as_l2([3 + view, 69], view=view)
        nest.write([7], v=1)
        nest.read_as_l2(range(70), view=view)
        assert set(nest.harvest()) == {3 + view, 7, 69}
        nest.vm.check()
    assert nest.harvest() == []


def test_each_alias_faults_again_after_a_harvest_and_marks_the_one_page(platform):
    nest = Nest(platform, views=VIEWS)
    nest.enter()
    nest.set_flags(LOG)
    for _ in range(3):
        before = nest.faults()
        for view in range(VIEWS):
            nest.write_as_l2([5, 5], view=view)
        assert nest.faults() - before == VIEWS
        assert nest.harvest() == [5]


def test_a_kernel_write_is_reported_and_leaves_l2s_protection_as_it_is(platform):
    nest = Nest(platform)
    nest.enter()
    nest.write_as_l2([5])
    nest.set_flags(LOG)
    nest.vm.kernel_write(nest.base + 5)
    before = nest.faults()
    nest.write_as_l2([5])
    assert nest.faults() - before == 1
    assert nest.harvest() == [5]


# -- toggles while in L2


def test_logging_that_begins_and_ends_in_l2_reports_what_l2_writes_meanwhile(platform):
    nest = Nest(platform, kind="thp", level=2)
    nest.enter()
    for _ in range(2):
        nest.write_as_l2(range(1024))
        nest.set_flags(LOG)
        nest.vm.check()
        nest.write_as_l2([1, 600])
        assert nest.harvest() == [1, 600]
        nest.set_flags(0)
        nest.vm.check()


@pytest.mark.parametrize("platform", [name for name in NESTED if "pml" in name.split("-")])
def test_the_pml_control_of_a_vcpu_in_l2_waits_until_it_is_back_in_l1(platform):
    nest = Nest(platform, vcpus=2)
    nest.enter(0)
    nest.write([0], v=1)
    for flags in (LOG, 0):
        nest.set_flags(flags)
        nest.write_as_l2([1])
        nest.write([2], v=1)
        assert [vcpu.pml01 for vcpu in nest.vm.vcpus] == [not flags, bool(flags)]
        assert [vcpu.nested.update_deferred for vcpu in nest.vm.vcpus] == [True, False]
        nest.leave(0)
        assert nest.vm.vcpus[0].pml01 == bool(flags)
        assert not nest.vm.vcpus[0].nested.update_deferred
        nest.enter(0)
    nest.set_flags(LOG)
    nest.set_flags(0)
    nest.leave(0)
    assert not nest.vm.vcpus[0].pml01


@pytest.mark.parametrize("platform", ["ept-pml", "ept-pml-rmap"])
def test_l2_writes_by_faults_where_l1_writes_by_pml(platform):
    nest = Nest(platform, kind="4k")
    nest.write(range(600))
    nest.enter()
    nest.write_as_l2(range(600))
    nest.set_flags(LOG)
    before, counted = nest.faults(), nest.vm.counters()["pml_entries"]
    nest.write_as_l2(range(600))
    assert nest.faults() - before == 600
    assert nest.vm.counters()["pml_entries"] == counted
    nest.leave()
    nest.write(range(600))
    assert nest.faults() - before == 600
    assert nest.vm.counters()["pml_entries"] - counted == 600
    assert nest.harvest() == list(range(600))


# -- slots, host, life


def test_a_slot_that_is_deleted_and_made_again_in_l2_logs_its_writes(platform):
    nest = Nest(platform, kind="thp", level=2)
    nest.set_flags(LOG)
    nest.enter()
    nest.write_as_l2([5])
    nest.vm.set_memory_region(0, 0, 0)
    nest.vm.check()
    assert nest.vm.vcpus[0].write(nest.at([5])).reason == "mmio"
    nest.set_flags(LOG)
    nest.write_as_l2([6])
    nest.vm.check()
    assert nest.harvest() == [6]
    nest.leave()
    nest.write([7])
    assert nest.harvest() == [7]


def test_a_slot_that_moves_while_l2_runs_takes_its_log_along(platform):
    nest = Nest(platform, vcpus=2)
    nest.set_flags(LOG)
    nest.enter()
    nest.write_as_l2([5])
    home, nest.base = nest.base, 1 << 17
    nest.set_flags(LOG)
    nest.vm.check()
    assert nest.vm.vcpus[0].write(nest.at([6])).reason == "mmio"
    nest.write([7], v=1)
    assert nest.harvest() == [5, 7]
    nest.base = home
    nest.set_flags(LOG)
    nest.write_as_l2([8])
    nest.vm.check()
    assert nest.harvest() == [8]


def test_the_host_takes_a_page_from_every_view(platform):
    nest = Nest(platform, kind="4k", views=VIEWS)
    nest.set_flags(LOG)
    nest.enter()
    for _ in range(2):
        for view in range(VIEWS):
            nest.write_as_l2([5], view=view)
        assert nest.harvest() == [5]
        mm.madvise(nest.memory, 5, 1)
        nest.vm.check()
        before = nest.faults()
        for view in range(VIEWS):
            nest.write_as_l2([5], view=view)
        assert nest.faults() - before == VIEWS
        assert nest.harvest() == [5]


def test_eager_split_takes_l2s_large_leaves_one_flush_each_where_l1s_are_the_tdp_mmus(nested):
    counted = []
    for eager in (False, True):
        nest = Nest(nested, kind="hugetlb2m", level=2)
        nest.vm.set_param("eager_page_split", eager)
        nest.enter()
        nest.write_as_l2([0, 512])
        assert nest.stats("pages_2m", "vm") == 2
        before = flushes(nest)
        nest.set_flags(LOG)
        counted.append((flushes(nest) - before, nest.stats("pages_2m", "vm"), nest.vm.counters()["splits_2m"]))
        nest.write_as_l2([3])
        assert nest.harvest() == [3]
    tdp = not nested.endswith("-rmap")
    assert counted == [(1, 2, 0), (3, 0, 2) if tdp else (1, 2, 0)]


def test_an_address_that_l1_maps_to_no_slot_is_mmio(platform):
    nest = Nest(platform)
    nest.tables.map(L2 + (1 << 13), 1 << 19)
    nest.enter()
    for kind in (spte.READ, spte.WRITE):
        for _ in range(2):
            assert nest.vm.vcpus[0].run([L2 + (1 << 13)], [kind]).reason == "mmio"
            nest.vm.check()


@pytest.mark.parametrize("platform", [name for name in NESTED if name.startswith("npt")])
def test_vmrun_and_vmexit_write_the_vmcb(platform):
    nest = Nest(platform)
    vmcb = TABLES_GFN + 60
    nest.log_tables()
    nest.vm.get_dirty_log(1)
    vcpu = nest.vm.vcpus[0]
    for switch in (lambda: vcpu.enter_l2(nest.tables.address(), vmcb=vmcb * PAGE), vcpu.leave_l2):
        switch()
        assert pages_of(nest.vm.get_dirty_log(1)) == {60}


def test_nothing_is_mapped_after_close_and_nobody_runs(platform):
    nest = Nest(platform, kind="thp", level=2, views=2)
    nest.enter()
    nest.write_as_l2(range(8))
    nest.write_as_l2(range(8), view=1)
    assert nest.vm.close() == 0
    assert [nest.stats(key, "vm") for key in ("pages_4k", "pages_2m")] == [0, 0]
    with pytest.raises(spte.KvmError, match="closed"):
        nest.vm.vcpus[0].write(nest.at([0]))


def test_a_full_ring_stops_l2_without_an_exit_to_l1(platform):
    nest = Nest(platform, mode="ring", npages=2048)
    nest.set_flags(LOG)
    nest.enter()
    stop = nest.vm.vcpus[0].write(nest.at(range(2048)))
    assert stop.reason == "dirty_ring_full"
    assert nest.vm.vcpus[0].in_l2 == (platform != "shadow")
    assert nest.take_ring() == list(range(stop.index + 1))  # the last one's fault has marked it
