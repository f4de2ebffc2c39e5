"""Profiles: the counts that each mechanism must show, and that every write is reported whatever the harvest."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import PLATFORMS

from spte import KvmError, Policy
from spte._numba import jit as _jit
from spte.access import READ, WRITE
from spte.profile import workload
from spte.profile.columns import Log
from spte.profile.perf_test import PerfTest
from spte.profile.run import DIRECT, profile
from spte.profile.workload import TraceWorkload, WorkloadError
from spte.trace import Trace
from spte.vm.vm import VM

compiled = pytest.mark.skipif(_jit.PLAIN, reason="hundreds of thousands of accesses in plain Python")
WITH_PML = ("ept-pml", "npt-pml")


@pytest.fixture(params=DIRECT)
def platform(request):
    """What a profile compares unless it is told otherwise; the counts below are those of the TDP MMU."""
    return request.param


def make_trace(npages=2048, epochs=3, seed=1):
    rng = np.random.default_rng(seed)
    pages = [np.flatnonzero(rng.random(npages) < share) for share in np.linspace(0.1, 0.6, epochs)]
    bounds = np.cumsum([0, *map(len, pages)])
    times = np.arange(epochs + 1) * 50_000_000
    return Trace(times, bounds, np.concatenate(pages).astype(np.uint32), npages, {"command": "toy"})


@pytest.fixture(scope="module")
def trace():
    return make_trace()


def one(work, platform="ept-pml", policy="6.12"):
    return profile(work, (platform,), (policy,))[0]


def counts(row):
    return [(p.name, p.counts) for p in row.phases], row.epochs, row.leafs


def writes_of(work, index):
    return np.concatenate([access.gfns for access in work.epoch(index)])


# -- workloads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [2048, 2 * 2048, 2048 + 512, 5 * 2048 - 1024])
@pytest.mark.parametrize("batch", [1 << 23, 700])
def test_a_larger_guest_writes_page_p_when_the_trace_writes_p_modulo_its_size(trace, monkeypatch, pages, batch):
    monkeypatch.setattr(workload, "BATCH", batch)
    work = TraceWorkload(trace, pages)
    for index in range(trace.nepochs):
        wrote = np.isin(np.arange(pages) % trace.npages, trace.epoch(index))
        assert writes_of(work, index).tolist() == np.flatnonzero(wrote).tolist()
        assert all(len(access.gfns) <= batch for access in work.epoch(index))


def test_populating_writes_every_page_once_in_order(trace, monkeypatch):
    monkeypatch.setattr(workload, "BATCH", 1000)
    got = np.concatenate([access.gfns for access in TraceWorkload(trace, 4096).populate()])
    assert got.tolist() == list(range(4096))


def test_2_mib_regions_are_dealt_to_vcpus_in_turn(trace):
    work = TraceWorkload(trace, vcpus=3)
    for index in range(trace.nepochs):
        for access in work.epoch(index):
            mine = trace.epoch(index)
            assert access.gfns.tolist() == mine[mine // 512 % 3 == access.vcpu].tolist()
        assert sorted(writes_of(work, index).tolist()) == trace.epoch(index).tolist()


def test_random_order_is_a_permutation_that_the_seed_decides(trace):
    ascending, first, again, other = (
        writes_of(TraceWorkload(trace, **how), 2) for how in ({}, {"order": "random"}, {"order": "random"}, {"order": "random", "seed": 1})
    )
    assert first.tolist() == again.tolist() != other.tolist()
    assert sorted(first.tolist()) == sorted(other.tolist()) == ascending.tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pages": 1024}, "memory of 4194304 bytes"),
        ({"pages": 2049}, "not a multiple of 2 MiB"),
        ({"pages": 1 << 40}, "memory of 4503599627370496 bytes"),
        ({"vcpus": 0}, "vcpus=0"),
        ({"vcpus": 1025}, "1 to 1024"),
        ({"backing": "8k"}, "backing='8k'"),
        ({"manual": 2}, "manual=2"),
        ({"order": "up"}, "order='up'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_trace_workload_refuses_what_no_guest_has(trace, change, said):
    with pytest.raises(WorkloadError, match=said):
        TraceWorkload(trace, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vcpus": 0}, "vcpus=0"),
        ({"bytes_per_vcpu": 4097}, "bytes_per_vcpu=4097"),
        ({"bytes_per_vcpu": 1 << 50}, "bytes_per_vcpu=1125899906842624"),
        ({"source": "disk"}, "source='disk'"),
        ({"memslots": 3}, "memslots=3; take a divisor"),
        ({"memslots": 0}, "memslots=0"),
        ({"memslots": 1 << 15}, "memslots=32768"),
        ({"write_percent": 101}, "write_percent=101"),
        ({"iterations": 0}, "iterations=0"),
        ({"seed": -3}, "seed=-3"),
    ],
)
def test_a_perf_test_refuses_what_the_selftest_refuses(change, said):
    with pytest.raises(WorkloadError, match=said):
        PerfTest(**change)


def test_the_perf_test_defaults_are_the_selftests():
    work = PerfTest()
    assert (work.vcpus, work.npages, work.backing, work.slots, work.nepochs, work.manual) == (1, 1 << 18, "4k", 1, 2, 3)
    assert PerfTest(no_manual_protect=True).manual == 0


def test_overlap_makes_every_vcpu_touch_all_memory_and_no_overlap_its_share():
    small = {"vcpus": 2, "bytes_per_vcpu": 64 << 10}
    shares = [access.gfns.tolist() for access in PerfTest(**small).epoch(0)]
    assert shares == [list(range(16)), list(range(16, 32))]
    assert [a.gfns.tolist() for a in PerfTest(**small, overlap=True).epoch(0)] == [list(range(32))] * 2


def test_write_percent_and_random_access_decide_kinds_and_pages():
    work = PerfTest(bytes_per_vcpu=16 << 20, write_percent=25, random_access=True)
    (access,) = work.epoch(0)
    assert 0.2 < (access.kinds == WRITE).mean() < 0.3
    assert len(np.unique(access.gfns)) < len(access.gfns) == 4096
    assert (next(work.epoch(0)).gfns == access.gfns).all()
    assert (next(work.epoch(1)).gfns != access.gfns).any()
    assert next(work.populate()).gfns.tolist() == list(range(4096))
    assert next(work.populate()).kinds is None


def test_no_write_percent_means_no_write():
    (access,) = PerfTest(bytes_per_vcpu=1 << 20, write_percent=0).epoch(0)
    assert (access.kinds == READ).all()


# -- counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_and_policy_reports_exactly_what_was_written(trace, platform, policy):
    row = one(TraceWorkload(trace), platform, policy)
    assert [e.written for e in row.epochs] == np.diff(trace.indptr).tolist()
    assert (row.reported, row.over_reported, row.lost) == (trace.writes, 0, 0)


def test_pml_costs_one_full_exit_for_512_writes_and_write_protection_a_fault_for_each(trace, platform):
    row = one(TraceWorkload(trace), platform)
    if platform in WITH_PML:
        assert row.count("pml_entries") == trace.writes
        assert row.count("pml_full") == sum((len(trace.epoch(i)) - 1) // 512 for i in range(trace.nepochs))
        assert row.count("faults_fast") == row.count("faults_slow") == 0
    else:
        assert row.count("faults_fast") == trace.writes
        assert row.count("pml_entries") == row.count("pml_full") == row.count("faults_slow") == 0


def test_enabling_splits_all_huge_pages_and_rearms_all_small_ones(trace, platform):
    row = one(TraceWorkload(trace), platform)
    assert row.leafs["populate"] == {"pages_4k": 0, "pages_2m": 4, "pages_1g": 0}
    assert row.leafs["logging"] == {"pages_4k": 2048, "pages_2m": 0, "pages_1g": 0}
    assert row.count("splits_2m", "enable") == 4
    assert row.count("faults_slow", "populate") == 4


def test_without_eager_split_only_the_first_write_to_a_region_is_a_slow_fault(trace, platform):
    row = one(TraceWorkload(trace), platform, "6.12,eager_page_split=N")
    assert row.count("splits_2m", "enable") == 0
    assert row.count("splits_2m", "dirty") == row.count("faults_slow") == 4
    assert (row.lost, row.policy) == (0, "6.12,eager_page_split=N")


def test_the_same_arguments_give_the_same_counts(trace, platform):
    work = TraceWorkload(trace, 3 * 2048, vcpus=2, order="random", seed=5)
    assert counts(one(work, platform)) == counts(one(work, platform))


def test_batches_change_nothing_but_the_drains_between_them(trace, platform, monkeypatch):
    ref = one(TraceWorkload(trace), platform)
    monkeypatch.setattr(workload, "BATCH", 100)
    got = one(TraceWorkload(trace), platform)
    assert got.epochs == ref.epochs
    for name in ("faults_fast", "faults_slow", "pml_entries", "sptes_written", "flushes", "splits_2m"):
        assert got.count(name) == ref.count(name)


def test_manual_protect_harvests_with_get_and_clear(trace, platform):
    row = one(TraceWorkload(trace, manual=1), platform)
    assert (row.reported, row.over_reported, row.lost) == (trace.writes, 0, 0)
    assert row.count("sptes_written", "get") == 0
    assert row.count("sptes_written", "clear") == trace.writes


def test_initially_set_enables_for_free_and_reports_everything_once(trace, platform):
    row = one(TraceWorkload(trace, manual=3), platform)
    assert row.count("sptes_written", "enable") == row.count("flushes", "enable") == 0
    assert row.epochs[0].reported == trace.npages
    assert row.epochs[0].initially_set == row.initially_set == trace.npages - row.epochs[0].written
    assert row.over_reported == row.lost == 0


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_dirty_ring_that_fills_up_loses_nothing(platform, vcpus):
    heavy = make_trace(npages=4096, epochs=4, seed=3)
    row = one(TraceWorkload(heavy, vcpus=vcpus, ring_bytes=16384), platform)
    assert (row.reported, row.over_reported, row.lost) == (heavy.writes, 0, 0)
    assert row.count("ring_full") > 0
    assert row.count("sptes_written", "reset") >= heavy.writes


def test_every_backing_is_reported_exactly(trace):
    kinds = [kind for kind in workload.BACKINGS if "1g" not in kind]
    rows = [one(TraceWorkload(trace, backing=kind)) for kind in kinds]
    assert [(row.reported, row.lost) for row in rows] == [(trace.writes, 0)] * len(rows)


@compiled
def test_the_perf_test_on_1_gib_pages_shows_what_the_selftest_would():
    row = one(PerfTest(source="anonymous_hugetlb_1gb"))
    by_name = {p.name: p.counts for p in row.phases}
    assert list(by_name) == [
        "Populate memory time",
        "Enabling dirty logging time",
        *(f"Iteration {i} {what} time" for i in (1, 2) for what in ("dirty memory", "get dirty log", "clear dirty log")),
        "Disabling dirty logging time",
    ]
    assert by_name["Enabling dirty logging time"]["sptes_written"] == 0
    assert by_name["Iteration 1 dirty memory time"]["faults_slow"] == 0
    clear = by_name["Iteration 1 clear dirty log time"]
    assert (clear["splits_1g"], clear["splits_2m"]) == (1, 512)
    dirty = by_name["Iteration 2 dirty memory time"]
    assert (dirty["faults_fast"], dirty["faults_slow"], dirty["pml_entries"]) == (0, 0, 262_144)
    assert dirty["pml_full"] in (511, 512)
    assert by_name["Iteration 2 clear dirty log time"]["sptes_written"] == 262_144


def test_vcpus_that_run_while_logging_is_disabled_fault_their_huge_pages_back(platform):
    small = {"bytes_per_vcpu": 8 << 20, "source": "anonymous_thp", "memslots": 2}
    still, running = (one(PerfTest(**small, run_while_disabling=e), platform) for e in (False, True))
    assert still.leafs["disable"]["pages_2m"] == 0
    assert running.leafs["disable"] == {"pages_4k": 0, "pages_2m": 4, "pages_1g": 0}
    assert running.count("faults_slow", "disable") >= 4


def test_rings_that_fill_while_the_other_slot_is_still_to_be_disabled_are_harvested(platform):
    work = PerfTest(bytes_per_vcpu=8 << 20, memslots=2, run_while_disabling=True)
    [row] = profile(work, [platform], logs=[Log(ring_bytes=16384)])
    assert row.lost == 0
    assert row.count("ring_full", "disable") > 0


def test_slots_whose_size_is_no_multiple_of_64_pages_are_compared_bit_by_bit(platform):
    row = one(PerfTest(bytes_per_vcpu=3 * 70 * 4096, memslots=3, no_manual_protect=True, write_percent=50), platform)
    assert 0 < row.written < 2 * 210
    assert row.lost == 0


# -- results --------------------------------------------------------------------------------------------------------------


def test_a_lost_page_is_counted_and_named(trace, monkeypatch):
    honest, first = VM.get_dirty_log, int(trace.epoch(0)[0])

    def forgetful(self, slot, out=None):
        log = honest(self, slot, out)
        log[first // 64] &= ~np.uint64(1 << first % 64)
        return log

    monkeypatch.setattr(VM, "get_dirty_log", forgetful)
    row = one(TraceWorkload(trace))
    losing = sum(first in trace.epoch(i) for i in range(trace.nepochs))
    assert (row.lost, row.epochs[0].first_lost, row.epochs[0].lost) == (losing, first, 1)


def test_rows_multiply_policy_by_policy(trace):
    changed = dataclasses.replace(Policy.named("6.1"), name="mine", eager_page_split=False)
    rows = profile(TraceWorkload(trace), ("npt", "ept-pml"), ("6.12", changed))
    assert [(r.policy, r.platform) for r in rows] == [(p, q) for p in ("6.12", "mine") for q in ("npt", "ept-pml")]


def test_the_default_platforms_are_the_direct_ones(trace):
    assert tuple(row.platform for row in profile(TraceWorkload(trace))) == DIRECT


def test_dirty_rate_is_by_the_traces_own_clock(trace):
    row = one(TraceWorkload(trace, 2 * 2048))
    assert row.dirty_pages_per_s == pytest.approx(2 * trace.writes / 0.15)
    assert one(PerfTest(bytes_per_vcpu=1 << 20)).dirty_pages_per_s is None


def test_measured_figures_are_positive_and_none_where_nothing_was_done(trace):
    row = one(TraceWorkload(trace))
    measured = (row.harvest_pages_per_s, row.enable_s_per_spte, row.guest_accesses_per_s)
    assert all(value > 0 for value in measured)
    idle = Trace(np.array([0, 0]), np.array([0, 0]), np.array([], np.uint32), 512)
    row = one(TraceWorkload(idle, manual=3), "npt")
    assert (row.guest_accesses_per_s, row.enable_s_per_spte, row.dirty_pages_per_s) == (None, None, None)


def test_a_combination_that_the_vm_refuses_is_refused_before_the_first_run(trace):
    calls = []
    with pytest.raises(KvmError, match="4096"):
        profile(TraceWorkload(trace, ring_bytes=4096), ("npt", "ept-pml"), progress=lambda *a: calls.append(a))
    assert not calls


def test_progress_counts_up_to_its_total(trace):
    calls = []
    profile(TraceWorkload(trace), ("npt", "ept-pml"), progress=lambda *a: calls.append(a))
    steps = trace.nepochs + 2
    assert [done for done, _, _ in calls] == [*range(steps), *range(steps, 2 * steps)]
    assert {total for _, total, _ in calls} == {2 * steps}
    assert calls[-1][2] == "ept-pml 6.12"


def test_workloads_describe_themselves_in_json(trace):
    for work in (TraceWorkload(trace), PerfTest()):
        about = json.loads(json.dumps(work.describe()))
        assert about["guest_pages"] == work.npages
        assert about["vcpus"] == 1
