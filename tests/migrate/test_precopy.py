"""Pre-copy against a reference by single events, and that whatever happens no page is lost and nothing is left behind."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from reference import Migration

from spte._numba import jit as _jit
from spte.cost import Costs, load
from spte.generate import PATTERNS, generate
from spte.migrate import MigrateError, Plan, migrate
from spte.migrate.guest import Guest
from spte.migrate.plan import LOGS
from spte.migrate.playback import TICKS, Playback
from spte.profile.workload import TraceWorkload, WorkloadError
from spte.trace import Trace, shipped
from spte.vm.vm import VM

compiled = pytest.mark.skipif(_jit.PLAIN, reason="hundreds of thousands of accesses in plain Python")
MIB = 1 << 20
HOW_TO = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()


def trace_of(pattern, *, rate, memory=4 * MIB, duration_ns=10**9, **parameters):
    return generate(PATTERNS[pattern](**parameters), memory=memory, rate=rate, duration_ns=duration_ns, interval_ns=50_000_000)


@pytest.fixture(scope="module")
def hot():
    """2 MB/s, of which nine in ten hit a tenth of 4 MiB."""
    return TraceWorkload(trace_of("hot-cold", rate=2 * 10**6), vcpus=2, order="random")


def plan_of(work, **how):
    return Plan(work, **{"bandwidth": 4 * 10**6, "downtime_ns": 60 * 10**6, **how})


def as_rounds(outcome):
    return [(r.duration_ns, r.sent, r.dirtied, r.throttle_percent) for r in outcome.rounds]


def same(plan):
    """Migrate both ways; they must agree to the ns."""
    outcome, expected = migrate(plan), Migration(plan)
    assert outcome.converged == expected.run()
    if outcome.converged:
        assert as_rounds(outcome) == expected.rounds
        assert outcome.total_ns == expected.now
        assert outcome.sent == expected.sent
        assert outcome.lost.tolist() == [page for page, version in expected.version.items() if expected.there[page] != version] == []
    else:
        assert as_rounds(outcome)[:-1] == expected.rounds
        assert outcome.sent == expected.sent
    return outcome


# -- against the reference


@pytest.mark.parametrize("after", ["repeat", "idle"])
@pytest.mark.parametrize("log", LOGS)
def test_rounds_times_and_pages_are_those_of_single_events(hot, log, after):
    assert same(plan_of(hot, log=log, after=after, chunk_pages=256)).converged


@pytest.mark.parametrize("chunk_pages", [64, 512, 1 << 18])
def test_a_page_that_is_cleared_late_is_sent_once_less(hot, chunk_pages):
    """CLEAR just before sending: what was written before it goes with the page."""
    late, early = (same(plan_of(hot, log=log, chunk_pages=chunk_pages)) for log in ("initially-set", "bitmap"))
    assert late.rounds[0].dirtied <= early.rounds[0].dirtied
    assert (late.rounds[0].dirtied < early.rounds[0].dirtied) == (chunk_pages < 1024)


def test_a_guest_that_stops_writing_is_let_go(hot):
    fast = TraceWorkload(trace_of("sequential", rate=20 * 10**6), order="random")
    for stop_ns in (0, 3 * 10**9 + 1):
        assert same(plan_of(fast, stop_ns=stop_ns)).total_ns > stop_ns
    assert not same(plan_of(fast, max_ns=7 * 10**9 + 3)).converged


def test_a_throttle_changes_what_the_guest_writes_to_the_ns():
    fast = TraceWorkload(trace_of("fixed-rate", rate=3 * 10**6), vcpus=2, order="random")
    plan = plan_of(fast, throttle="auto-converge", bandwidth=2 * 10**6)
    outcome = same(plan)
    assert outcome.converged
    assert outcome.throttle_percent == 50
    assert not migrate(dataclasses.replace(plan, throttle="none")).converged


@compiled
@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize(("name", "bandwidth"), [("redis", 50 * 10**6), ("redis", 10**9), ("sqlite", 400 * 10**6)])
def test_a_recorded_trace_takes_as_long_as_by_single_events(name, bandwidth, vcpus):
    same(Plan(TraceWorkload(shipped(name), vcpus=vcpus, order="random"), bandwidth=bandwidth, max_ns=3 * 10**9))


# -- what logging takes from the guest


def test_stalls_slow_the_guest_down_within_one_step(hot):
    """A first write to a page costs 1 ms here, so that a good part of the guest's time is gone; a step late, it is charged."""
    costs = Costs.only(fast_fault=900_000.0, exit=100_000.0)
    plan = plan_of(hot, platform="npt", costs=costs)
    outcome, expected = migrate(plan), Migration(plan, stall=1_000_000)
    assert expected.run()
    assert outcome.converged
    assert outcome.stall_ns == pytest.approx(expected.lost_ns, rel=0.01) != 0
    assert outcome.total_ns == pytest.approx(expected.now, rel=0.01)
    assert outcome.sent == pytest.approx(expected.sent, rel=0.01)
    assert outcome.stall_ns > 0.1 * outcome.total_ns
    assert outcome.sent < migrate(plan_of(hot, platform="npt")).sent


def test_calls_of_the_vmm_delay_the_link_and_are_part_of_the_downtime(hot):
    costs = Costs.only(get_word=100_000.0)
    free, priced = migrate(plan_of(hot)), migrate(plan_of(hot, costs=costs))
    words = hot.npages // 64
    assert priced.downtime.harvest_ns == words * 100_000
    assert free.downtime.harvest_ns == 0
    assert priced.rounds[0].duration_ns - free.rounds[0].duration_ns == words * 100_000
    assert all(one.vmm_ns == words * 100_000 for one in priced.rounds)


@pytest.mark.parametrize("log", LOGS)
def test_each_way_to_log_is_charged_for_what_it_does(hot, log):
    outcome = migrate(plan_of(hot, log=log, costs=load("guess").costs, chunk_pages=256))
    assert outcome.stall_ns > 0
    assert all(one.vmm_ns > 0 for one in outcome.rounds)
    assert not len(outcome.lost)


@compiled
@pytest.mark.long
@pytest.mark.parametrize(("name", "bandwidth"), [("redis", 50 * 10**6), ("sqlite", 900 * 10**6)])
def test_stalls_on_a_recorded_trace_are_those_of_single_events(name, bandwidth):
    """A first write costs 20 us, so that up to a tenth of the time is lost; docs/migrate.md tells how far the two are apart."""
    costs = Costs.only(fast_fault=20_000.0)
    plan = Plan(TraceWorkload(shipped(name), vcpus=2, order="random"), bandwidth=bandwidth, platform="npt", costs=costs, max_ns=10**11)
    outcome, expected = migrate(plan), Migration(plan, stall=20_000)
    assert outcome.converged == expected.run() is True
    cells = [f"{name}, {bandwidth * 8 / 1e6:g} Mbit/s"]
    down = plan.fixed_ns + plan.wire_ns(expected.rest)
    for got, wanted in ((outcome.total_ns, expected.now), (outcome.downtime.total_ns, down), (outcome.stall_ns, expected.lost_ns)):
        assert got == pytest.approx(wanted, rel=0.01)
        cells.append(f"{got / 1e6:,.1f} ms of {wanted / 1e6:,.1f} ms, {100 * (got / wanted - 1):+.2f} %")
    assert f"| {' | '.join(cells)} |\n" in HOW_TO


# -- throttles


def test_auto_converge_goes_up_in_the_steps_that_qemu_publishes():
    """Two periods of more than a second in which much was dirtied: 20 %, two more: 30 %, and so on, never more than 99 %."""
    fast = TraceWorkload(trace_of("sequential", rate=10**9, duration_ns=10**8), order="random")
    outcome = migrate(plan_of(fast, throttle="auto-converge", max_ns=40 * 10**9))
    steps = [one.throttle_percent for one in outcome.rounds]
    assert all(one.duration_ns > 10**9 for one in outcome.rounds[:18])
    assert steps[:20] == [0, 0, 20, 20, 30, 30, 40, 40, 50, 50, 60, 60, 70, 70, 80, 80, 90, 90, 99, 99]


def test_rounds_shorter_than_a_second_are_one_period_together():
    fast = TraceWorkload(trace_of("sequential", rate=10**9, duration_ns=10**8), order="random")
    outcome = migrate(plan_of(fast, throttle="auto-converge", bandwidth=10 * 10**6, downtime_ns=25 * 10**6, max_ns=10 * 10**9))
    changed = [one.start_ns for before, one in itertools.pairwise(outcome.rounds) if one.throttle_percent != before.throttle_percent]
    assert all(one.duration_ns < 10**9 for one in outcome.rounds)
    assert len(changed) > 2
    assert all(later - earlier > 2 * 10**9 for earlier, later in itertools.pairwise(changed))


def busy_and_quiet(throttle):
    """Two vCPUs: the first writes all its memory over and over, the second a page now and then; the downtime holds no page."""
    busy, quiet = np.arange(512), np.array([512])
    gfn = np.concatenate([busy, quiet] * 4).astype(np.uint32)
    trace = Trace(np.arange(5) * 100_000_000, np.arange(5) * 513, gfn, 1024, {"command": "toy"})
    return migrate(plan_of(TraceWorkload(trace, vcpus=2, order="random"), log="ring", throttle=throttle, max_ns=12 * 10**9,
                           downtime_ns=21 * 10**6, vcpu_dirty_limit=1000 * 4096))  # fmt: skip


def test_auto_converge_slows_every_vcpu_and_dirty_limit_those_that_write(monkeypatch):
    ran = {}
    until = Playback.until

    def spy(self, ticks):
        ran[self._vcpu] = ticks
        return until(self, ticks)

    monkeypatch.setattr(Playback, "until", spy)
    outcome = busy_and_quiet("auto-converge")
    assert outcome.throttle_percent > 20
    assert ran[0] == ran[1] < outcome.total_ns * TICKS * 0.9
    outcome = busy_and_quiet("dirty-limit")
    limited = [one for one in outcome.rounds if one.dirty_limit]
    marks, seconds = sum(one.counts["dirty_marks"] for one in limited), sum(one.duration_ns for one in limited) / 1e9
    assert seconds > 5
    assert 950 < marks / seconds <= 1000 + 10  # the limit, and the ten pages a second of the other vCPU
    assert ran[0] < outcome.total_ns * TICKS * 0.6
    assert ran[1] > outcome.total_ns * TICKS * 0.95


# -- nothing lost, nothing left


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("log", LOGS)
def test_every_page_arrives_and_logging_leaves_nothing_behind(platform, log, nested):
    work = TraceWorkload(trace_of("hot-cold", rate=2 * 10**6), vcpus=2, order="random")
    policies = ("6.12", "5.15") if log != "ring" else ("6.12",)
    for policy in policies:
        for max_ns in (10**12, 1_200_000_000):
            outcome = migrate(plan_of(work, platform=platform, policy=policy, log=log, nested=nested, chunk_pages=256, max_ns=max_ns))
            assert outcome.converged == (max_ns > 2 * 10**9)
            assert not len(outcome.lost)
            left = outcome.source
            assert left.huge_after == left.huge_before > left.huge_logging
            assert (left.pending, left.logging_slots) == (0, 0)


def test_a_log_that_forgets_a_page_is_found_out(hot, monkeypatch):
    get, victim = VM.get_dirty_log, int(hot.trace.gfn[0])

    def forgetful(self, slot, out=None):
        words = get(self, slot, out)
        words[victim // 64] &= ~np.uint64(1 << victim % 64)
        return words

    monkeypatch.setattr(VM, "get_dirty_log", forgetful)
    assert migrate(plan_of(hot)).lost.tolist() == [victim]


def test_a_migration_that_fails_turns_logging_off(hot, monkeypatch):
    vms = []
    enable = Guest.enable
    monkeypatch.setattr(Guest, "enable", lambda guest: vms.append(guest.vm) or enable(guest))

    def fail(one):
        assert vms[0].nr_memslots_dirty_logging == 1
        raise RuntimeError("the link is down")

    with pytest.raises(RuntimeError, match="the link is down"):
        migrate(plan_of(hot), progress=fail)
    assert vms[0].nr_memslots_dirty_logging == 0


# -- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bandwidth": 0}, "bandwidth=0 bytes/s; take 1 to"),
        ({"downtime_ns": 20_000_000}, "a downtime of 20 ms is not above its fixed part of 20 ms"),
        ({"log": "tape"}, "log='tape'; take one of bitmap, manual"),
        ({"throttle": "brake"}, "throttle='brake'; take one of none"),
        ({"after": "explode"}, "after='explode'; take one of repeat"),
        ({"chunk_pages": 100}, "clear_chunk=100 is not a positive multiple of 64"),
        ({"throttle": "dirty-limit"}, "log='bitmap'.*take log='ring'"),
        ({"vcpu_dirty_limit": 1}, "vcpu_dirty_limit=1 bytes/s"),
        ({"vcpu_dirty_limit": 10**14}, "vcpu_dirty_limit=100000000000000 bytes/s; take 4096"),
        ({"log": "ring", "ring_bytes": 0}, "ring_bytes=0"),
        ({"log": "ring", "ring_bytes": 1000}, "ring of 1000 bytes is not a power of two"),
        ({"log": "ring", "policy": "5.10"}, "has no dirty rings"),
        ({"max_ns": -1}, "max_ns=-1"),
        ({"stop_ns": -1}, "stop_ns=-1"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(hot, change, said):
    with pytest.raises((MigrateError, WorkloadError), match=said):
        plan_of(hot, **change)


@pytest.mark.parametrize(
    "change",
    [{"bandwidth": 1.5}, {"log": 3}, {"costs": "guess"}, {"stop_ns": "30s"}, {"workload": None}, {"chunk_pages": 64.0}, {"max_ns": None}],
    ids=str,
)
def test_a_plan_of_wrong_types_is_refused(hot, change):
    with pytest.raises(TypeError, match=f"^{next(iter(change))}="):
        dataclasses.replace(plan_of(hot), **change)


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        (Trace(np.array([0, 5]), np.array([0, 0]), np.empty(0, np.uint32), 512), "the trace writes no page"),
        (Trace(np.array([5, 5]), np.array([0, 1]), np.array([7], np.uint32), 512), "the trace lasts 0 ns"),
    ],
)
def test_a_trace_without_writes_in_time_is_refused(trace, said):
    with pytest.raises(MigrateError, match=said):
        Plan(TraceWorkload(trace))
