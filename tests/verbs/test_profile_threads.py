"""`spte profile --threads`: vCPUs that go on during harvests and disabling lose nothing, and all that is exact stays as it is."""

import dataclasses
import json
import threading

import commandline
import numpy as np
import pytest

from spte._numba import jit as _jit
from spte.cli.metrics import THREADS_COUNTS, THREADS_MEASURED
from spte.host.backing import Backing
from spte.policy import parse
from spte.profile.columns import Column, Log
from spte.profile.perf_test import PerfTest
from spte.profile.phases import Plan, ProfileError
from spte.profile.run import profile
from spte.profile.threads import PIECE, ThreadedRun, VcpuThreads, pieces
from spte.profile.workload import Access, TraceWorkload
from spte.trace import Trace
from spte.vm.vm import VM

LOGS = (Log(), Log(1), Log(3), Log(ring_bytes=16384))
SMALL = PerfTest(vcpus=2, bytes_per_vcpu=4 << 20, memslots=2, write_percent=50)
LETTERS = ("--workload", "perf-test", "-v", "2", "-b", "2M", "--platform", "ept-pml", "--platform", "npt-rmap", "--log", "bitmap")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_jit, "is_warm", lambda: True)


def spte(capsys, *argv):
    return commandline.spte(capsys, "profile", *argv)


def column_of(platform, log=LOGS[0]):
    return Column(platform, parse("6.12"), log, "4k")


# -- what is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
@pytest.mark.parametrize("platform", ["ept-pml", "npt", "npt-rmap"])
def test_every_page_written_beside_harvests_is_reported(platform, log):
    [row] = profile(SMALL, [platform], logs=[log], threads=True)
    assert (row.threads.lost, row.threads.first_lost) == (0, None)
    assert row.threads.harvests >= SMALL.nepochs
    assert row.threads.reported >= row.written
    assert row.threads.vcpus_beside == (platform != "npt-rmap")
    assert row.threads.disable_s is None


@pytest.mark.parametrize("log_from", ["populated", "creation"])
def test_vcpus_of_e_go_on_while_logging_is_disabled(log_from):
    for log in LOGS:
        [row] = profile(dataclasses.replace(SMALL, run_while_disabling=True), ["ept-pml"], logs=[log], log_from=log_from, threads=True)
        assert row.threads.lost == 0
        assert row.threads.disable_s > 0


def test_a_trace_whose_epochs_leave_vcpus_idle():
    pages = [np.arange(0), np.arange(512), np.array([700, 1000])]
    bounds = np.cumsum([0, *map(len, pages)])
    trace = Trace(np.arange(4) * 10_000_000, bounds, np.concatenate(pages).astype(np.uint32), 2048, {"command": "a toy"})
    [row] = profile(TraceWorkload(trace, vcpus=3), ["ept-nopml"], threads=True)
    assert row.threads.lost == 0
    assert row.threads.reported >= row.written == 514


def test_a_guest_that_only_reads_reports_nothing():
    [row] = profile(dataclasses.replace(SMALL, write_percent=0, no_manual_protect=True), ["npt"], threads=True)
    assert (row.threads.lost, row.threads.reported) == (0, 0)
    assert row.threads.writes > 0


def test_what_is_exact_is_that_without_threads():
    plain, beside = (profile(SMALL, ["ept-pml"], threads=threads)[0] for threads in (False, True))
    assert plain.threads is None
    assert plain.epochs == beside.epochs
    assert [phase.counts for phase in plain.phases] == [phase.counts for phase in beside.phases]


def test_progress_counts_both_runs():
    steps = []
    profile(SMALL, ["ept-pml", "npt"], threads=True, progress=lambda done, total, what: steps.append((done, total, what)))
    assert {total for _, total, _ in steps} == {16}
    assert [done for done, _, _ in steps] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


# -- that the check can fail ----------------------------------------------------------------------------------------------


class Forgetful(VM):
    """A VM whose every GET forgets the lowest page that is dirty."""

    def get_dirty_log(self, slot, out=None):
        log = super().get_dirty_log(slot, out)
        dirty = np.flatnonzero(log)
        if dirty.size:
            log[dirty[0]] &= log[dirty[0]] - np.uint64(1)
        return log


def test_a_page_that_no_harvest_reports_is_lost(monkeypatch):
    monkeypatch.setattr("spte.profile.phases.VM", Forgetful)
    run = ThreadedRun(PerfTest(bytes_per_vcpu=1 << 20), column_of("ept-pml"), Plan())
    with run.vm:
        found = run.measure(lambda done: None)
        run.vm.check()
    assert found.lost >= 2  # the first page of each epoch
    assert found.first_lost == 0


class Swallowing(ThreadedRun):
    """A run that harvests once the vCPUs have ended and drops what it got."""

    def _go_on(self, work):
        super()._go_on(work)
        self._harvest()
        self._seen.fill(0)


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
def test_a_batch_written_after_the_last_harvest_must_be_in_the_next(log):
    run = Swallowing(PerfTest(bytes_per_vcpu=1 << 20, iterations=1), column_of("ept-pml", log), Plan())
    with run.vm:
        assert run.measure(lambda done: None).lost == 256


def test_pages_lost_beside_threads_are_exit_code_1(capsys, monkeypatch):
    measure = ThreadedRun.measure
    monkeypatch.setattr(ThreadedRun, "measure", lambda run, step: dataclasses.replace(measure(run, step), lost=3, first_lost=7))
    code, _, err = spte(capsys, *LETTERS, "--threads")
    assert code == 1
    assert "spte profile: ept-pml: 3 pages were written and not reported, first gfn 7, with vCPUs on threads" in err


# -- threads end ----------------------------------------------------------------------------------------------------------


def guest(vcpus, ring_bytes=0):
    vm = VM("ept-pml", vcpus=vcpus, ring_bytes=ring_bytes)
    vm.set_memory_region(0, 0, 8 << 20, Backing("4k", 8 << 20), flags=1)
    return vm


def test_a_vcpu_that_stops_for_another_reason_is_raised_and_all_threads_end():
    before = set(threading.enumerate())
    with guest(2) as vm, pytest.raises(ProfileError, match="vCPU 1 stopped at gfn 4096: mmio"):  # noqa: SIM117, PT012
        with VcpuThreads(vm, {0: [Access(0, np.arange(8, dtype=np.uint64))], 1: [Access(1, np.array([4096], np.uint64))]}) as vcpus:
            while vcpus.running:
                vcpus.pause()
    assert set(threading.enumerate()) <= before


def test_an_exception_beside_vcpus_whose_rings_are_full_ends_them():
    before = set(threading.enumerate())
    with guest(1, ring_bytes=16384) as vm, pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with VcpuThreads(vm, {0: [Access(0, np.arange(2048, dtype=np.uint64))]}):
            raise KeyboardInterrupt
    assert set(threading.enumerate()) <= before


def test_batches_are_cut_and_stay_in_order():
    gfns = np.arange(PIECE + 5, dtype=np.uint64)
    kinds = np.tile(np.array([1, 2], np.uint8), PIECE)[: len(gfns)]
    work = pieces([Access(1, gfns, kinds), Access(0, gfns[:0]), Access(1, gfns[:3])])
    assert list(work) == [1]
    assert [len(access.gfns) for access in work[1]] == [PIECE, 5, 3]
    np.testing.assert_array_equal(np.concatenate([access.gfns for access in work[1][:2]]), gfns)
    np.testing.assert_array_equal(np.concatenate([access.kinds for access in work[1][:2]]), kinds)
    assert work[1][2].kinds is None


# -- what is printed ------------------------------------------------------------------------------------------------------


def test_the_table_marks_counts_that_depend_on_timing(capsys):
    code, out, _ = spte(capsys, *LETTERS, "-e", "--threads")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    timing, measured = lines.index("depends on timing"), lines.index("measured here")
    assert timing < measured
    assert all(line.startswith("~ ") for line in lines[timing + 1 : measured])
    for label in ("guest writes/s during harvest", "harvest waits for vCPUs, us", "disable beside vCPUs, ms"):
        assert any(line.startswith(label) for line in lines[measured:])
    assert "~ depends on timing: another run with vCPUs on threads counts otherwise; all other counts are exact" in lines
    assert "npt-rmap: vCPUs on threads take turns, with harvests too: KVM's shadow MMU holds mmu_lock for writing" in lines


def test_a_clear_that_excludes_vcpus_is_said(capsys):
    _, out, _ = spte(capsys, *LETTERS[:8], "--log", "initially-set", "--threads")
    assert "ept-pml: each GET and CLEAR waits until all vCPUs have stopped: with initially-set, CLEAR may split huge pages" in out


def test_markdown_says_which_lines_depend_on_timing(capsys):
    _, out, _ = spte(capsys, *LETTERS, "--threads", "--markdown")
    assert "| ~ harvests (depends on timing) |" in out
    assert "| guest writes/s during harvest (measured here) |" in out


def test_json_holds_them_apart(capsys):
    _, out, _ = spte(capsys, *LETTERS, "--threads", "--json")
    for row in json.loads(out)["rows"]:
        beside = row["threads"]
        assert beside["pages_lost"] == 0
        assert list(beside["depends_on_timing"]) == [metric.key for metric in THREADS_COUNTS]
        assert list(beside["measured"]) == [metric.key for metric in THREADS_MEASURED]
        assert beside["vcpus_side_by_side"] == beside["harvests_beside_vcpus"] == (row["platform"] == "ept-pml")


def test_without_threads_nothing_tells_of_them(capsys):
    _, out, _ = spte(capsys, *LETTERS)
    assert "~" not in out
    assert "threads" not in out
    _, out, _ = spte(capsys, *LETTERS, "--json")
    assert [row["threads"] for row in json.loads(out)["rows"]] == [None, None]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "--epochs"], "--threads adds to the table, which --epochs does not print; leave one out"),
        (["--threads", "--limits"], "--threads has no meaning beside --limits"),
        (["--threads", "-e"], "-e needs --workload perf-test"),
    ],
)
def test_what_does_not_fit_is_refused(capsys, argv, message):
    code, out, err = spte(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
