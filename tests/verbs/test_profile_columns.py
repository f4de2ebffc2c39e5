"""`spte profile` with several ways to log: one table, marks, notes, epochs, estimates and the verdict."""

import csv
import dataclasses
import io
import json
import re

import commandline
import numpy as np
import pytest

from spte._numba import jit as _jit
from spte.cli.metrics import COUNTS
from spte.cost import load, names
from spte.cost.costs import ITEMS
from spte.profile.columns import Log, labels
from spte.profile.estimate import estimate
from spte.profile.perf_test import PerfTest
from spte.profile.recommend import FARTHEST, recommend
from spte.profile.run import profile
from spte.profile.workload import TraceWorkload, WorkloadError
from spte.trace import Trace, save

GUESS = load("guess")
LOGS = (Log(), Log(1), Log(3), Log(ring_bytes=16384))


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(7)
    pages = [np.flatnonzero(rng.random(2048) < share) for share in (0.3, 0.1, 0.5)]
    bounds = np.cumsum([0, *map(len, pages)])
    return Trace(np.arange(4) * 10_000_000, bounds, np.concatenate(pages).astype(np.uint32), 2048, {"command": "a toy"})


@pytest.fixture(scope="module")
def rows(toy):
    return profile(TraceWorkload(toy, vcpus=2), ("ept-pml", "ept-nopml"), logs=LOGS)


@pytest.fixture(scope="module")
def path(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "toy.npz"
    save(toy, path)
    return str(path)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(_jit, "is_warm", lambda: True)


def spte(capsys, *argv):
    return commandline.spte(capsys, "profile", *argv)


def cells(markdown):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return lines[0], {label: values for label, *values in lines[2:]}


# -- columns ----------------------------------------------------------------------------------------------------------


def test_columns_are_platform_times_mode_times_policy_and_each_loses_nothing(toy):
    rows = profile(TraceWorkload(toy), ("npt", "ept-pml"), ("6.12", "6.1"), logs=(Log(), Log(1)), backings=("thp", "4k"))
    assert [tuple(row.column.names.values()) for row in rows] == [
        (p, log, b, v) for v in ("6.12", "6.1") for log in ("bitmap", "manual") for b in ("thp", "4k") for p in ("npt", "ept-pml")
    ]
    assert {(row.reported, row.lost) for row in rows} == {(toy.writes, 0)}


def test_labels_are_what_differs(rows):
    assert labels([row.column for row in rows])[:3] == [("ept-pml", "bitmap"), ("ept-nopml", "bitmap"), ("ept-pml", "manual")]
    assert labels([rows[0].column]) == [("ept-pml",)]


def test_the_counts_of_vcpus_and_of_the_vmm_add_up_to_the_phase(rows):
    for row in rows:
        for phase in row.phases:
            ran = sum(vcpu["exits"] for vcpu in phase.vcpus.values())
            assert phase.vmm["exits"] + ran == phase.counts["exits"]
            assert (phase.vmm["exits"] == 0) == (phase.kind != "populate" or ran == phase.counts["exits"])
        dirty = [phase for phase in row.phases if phase.kind == "dirty"]
        assert sum(vcpu["accesses"] for phase in dirty for vcpu in phase.vcpus.values()) == row.accesses
        assert all(set(phase.vcpus) == {0, 1} for phase in dirty)


def test_clearing_in_chunks_arms_the_same_pages_in_more_calls(toy):
    whole, chunks = (profile(TraceWorkload(toy, manual=1), ("ept-pml",), clear_chunk=chunk)[0] for chunk in (None, 512))
    assert chunks.epochs == whole.epochs
    assert chunks.count("sptes_written", "clear") == whole.count("sptes_written", "clear")
    calls = [phase.calls for phase in chunks.phases if phase.kind == "clear"]
    assert calls == [4] * 3
    assert chunks.count("flushes", "clear") == 4 * whole.count("flushes", "clear")
    assert estimate(chunks, GUESS.costs).hold < estimate(whole, GUESS.costs).hold


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
def test_logging_from_creation_on_reports_what_populating_wrote(toy, log):
    (row,) = profile(TraceWorkload(toy), ("ept-pml",), logs=(log,), log_from="creation")
    kinds = [phase.kind for phase in row.phases]
    assert kinds[:2] == ["enable", "populate"]
    assert kinds[2 : 2 + len(log.harvest)] == list(log.harvest)
    assert (row.populated.written, row.populated.reported, row.lost) == (2048, 2048, 0)
    assert row.reported == toy.writes
    assert row.initially_set == row.over_reported == 0
    assert row.leafs["populate"]["pages_4k"] == 2048


def test_an_unknown_beginning_or_chunk_is_refused(toy):
    with pytest.raises(WorkloadError, match="log_from='boot'"):
        profile(TraceWorkload(toy), log_from="boot")
    with pytest.raises(WorkloadError, match="clear_chunk=65"):
        profile(TraceWorkload(toy), clear_chunk=65)
    with pytest.raises(WorkloadError, match="manual=2"):
        Log(2)


# -- the table ----------------------------------------------------------------------------------------------------------


def test_what_differs_from_the_first_column_is_marked(capsys, path):
    argv = [path, "--platform", "ept-pml", "--log", "bitmap", "--log", "ring=16K,manual", "--log", "initially-set"]
    _, out, _ = spte(capsys, *argv, "--markdown")
    head, table = cells(out)
    assert head == ["policy 6.12", "bitmap", "ring=16K,manual", "initially-set"]
    assert table["pages lost"] == ["0", "0", "0"]
    assert re.fullmatch(r"\*\*[\d,]+\*\*", table["pages reported"][2])
    for label, (first, *others) in table.items():
        if "measured" not in label:
            assert "*" not in first
            assert all((cell.strip("*") != first) == cell.startswith("**") for cell in others)
    _, out, _ = spte(capsys, *argv)
    assert "* not as in the first column" in out
    assert re.search(r"^pages reported +[\d,]+ +[\d,]+ +[\d,]+\*$", out, re.MULTILINE)


def test_one_column_is_not_marked(capsys, path):
    _, out, _ = spte(capsys, path, "--platform", "npt")
    assert "*" not in out


def test_a_turned_table_holds_the_same_figures(capsys, path):
    argv = [path, "--platform", "ept-pml", "--platform", "npt", "--markdown"]
    head, table = cells(spte(capsys, *argv)[1])
    turned_head, turned = cells(spte(capsys, *argv, "--pivot")[1])
    assert turned_head[1:] == list(table)
    for i, name in enumerate(head[1:]):
        exact = [j for j, label in enumerate(table) if "measured" not in label]
        assert [turned[name][j] for j in exact] == [list(table.values())[j][i] for j in exact]
    _, out, _ = spte(capsys, *argv[:-1], "--pivot")
    assert "* not as in the first line" in out


def test_a_table_of_every_mode_names_no_ioctl_of_one(capsys, path):
    _, out, _ = spte(capsys, path, "--platform", "ept-pml", "--log", "bitmap", "--log", "manual", "--log", "ring=16K")
    assert not re.search(r"\b(GET|CLEAR|RESET)\b", out)


def test_eager_multiplies_the_policies(capsys, path):
    _, out, _ = spte(capsys, path, "--platform", "npt", "--eager", "Y", "--eager", "N", "--json")
    assert [row["policy"] for row in json.loads(out)["rows"]] == ["6.12,eager_page_split=Y", "6.12,eager_page_split=N"]


def test_useless_combinations_are_explained_in_one_line_each(capsys, path):
    options = ["--platform", "ept-pml", "--eager", "N", "--log", "bitmap", "--log", "initially-set", "--clear-chunk", "64"]
    code, out, _ = spte(capsys, path, *options, "--json")
    report = json.loads(out)
    bitmap, initially = report["rows"]
    marks = sum(phase["counts"]["dirty_marks"] for phase in bitmap["phases"] if phase["kind"] == "dirty")
    twice = marks - bitmap["counts"]["pages_written"]
    assert (code, twice > 0) == (0, True)
    lazy, chunk, once = report["notes"]
    assert lazy.startswith(f"bitmap: huge pages are split in faults, which mark the page, and PML logs it once more: {twice:,} marks")
    assert chunk.startswith("bitmap: --clear-chunk changes nothing")
    unwritten = f"{initially['counts']['pages_initially_set']:,} of these pages were not written"
    assert once == f"initially-set: initially-set reports the whole memory once; {unwritten}"
    assert spte(capsys, path, *options)[1].endswith("\n".join(["", *report["notes"], ""]))


# -- epochs -------------------------------------------------------------------------------------------------------------


def test_epochs_are_a_line_an_epoch_and_column_and_add_up_to_the_table(capsys, path, toy):
    argv = [path, "--platform", "ept-nopml", "--log", "bitmap", "--log", "ring=16K", "--cost", "guess"]
    lines = list(csv.DictReader(io.StringIO(spte(capsys, *argv, "--epochs", "--csv")[1])))
    report = json.loads(spte(capsys, *argv, "--json")[1])
    assert [(line["log"], line["epoch"]) for line in lines] == [(log, str(i)) for log in ("bitmap", "ring=16K") for i in range(3)]
    for row in report["rows"]:
        mine = [line for line in lines if line["log"] == row["log"]]
        assert [int(line["pages_written"]) for line in mine] == np.diff(toy.indptr).tolist()
        assert sum(int(line["faults_fast"]) for line in mine) == row["counts"]["faults_fast"]
        assert sum(int(line["sptes_written_harvest"]) for line in mine) == row["counts"]["sptes_written_harvest"]
        mean = sum(float(line["estimated_guest_stall_ns"]) for line in mine) / 3
        assert row["estimated"]["guest_stall_ms_per_epoch"] == pytest.approx(mean / 1e6)
    banded = csv.DictReader(io.StringIO(spte(capsys, *argv, "--epochs", "--csv", "--cost-range")[1]))
    for line in banded:
        low, ns, high = (float(line[f"estimated_guest_stall_{which}ns"]) for which in ("low_", "", "high_"))
        assert low < ns < high
    same = json.loads(spte(capsys, *argv, "--epochs", "--json")[1])
    assert same["schema"] == "spte-profile-epochs/1"
    assert [{k: str(v) for k, v in line.items()} for line in same["epochs"]] == lines


@pytest.mark.parametrize("style", [[], ["--markdown"]])
def test_epochs_print_as_a_table_without_what_is_always_0(capsys, path, style):
    _, out, _ = spte(capsys, path, "--platform", "npt", "--epochs", *style)
    head, *lines = [line for line in out.splitlines() if "--:" not in line]
    assert len(lines) == 3
    assert "faults_fast" in head
    assert "pml_entries" not in head
    assert "estimated" not in head


def test_a_workload_without_time_has_epochs_without_time(capsys):
    code, out, _ = spte(capsys, "--workload", "perf-test", "-b", "2M", "--platform", "npt", "--epochs", "--csv")
    assert code == 0
    assert all(line["start_ns"] == line["end_ns"] == "" for line in csv.DictReader(io.StringIO(out)))


# -- estimates ------------------------------------------------------------------------------------------------------------


def test_without_costs_nothing_is_estimated(capsys, path):
    assert "estimate" not in spte(capsys, path, "--platform", "npt")[1]
    report = json.loads(spte(capsys, path, "--platform", "npt", "--json")[1])
    assert report["costs"] is report["verdict"] is report["rows"][0]["estimated"] is None


def test_estimates_are_marked_and_say_what_they_rest_on(capsys, path):
    _, out, _ = spte(capsys, path, "--platform", "npt", "--cost", "guess", "--markdown")
    _, table = cells(out)
    marked = [label for label in table if label.endswith(" (estimated)")]
    assert [label.partition(",")[0] for label in marked] == ["guest stall", "VMM time", "mmu_lock"]
    assert f"estimated at the costs of guess: {GUESS.title}; guesses: fast_fault, " in out


def test_the_band_of_an_estimate_is_that_of_the_lowest_and_highest_costs(capsys, path):
    _, out, _ = spte(capsys, path, "--platform", "npt", "--cost", "guess", "--cost-range", "--json")
    for figure in json.loads(out)["rows"][0]["estimated"].values():
        low, high = figure["band"]
        assert low < figure["value"] < high
    _, out, _ = spte(capsys, path, "--platform", "npt", "--cost", "guess", "--cost-range")
    assert re.search(r"^guest stall, ms/epoch +[\d.]+ \([\d.]+ to [\d.]+\)$", out, re.MULTILINE)


def test_the_stall_of_write_protection_is_a_fault_a_page(toy):
    (row,) = profile(TraceWorkload(toy, backing="4k"), ("ept-nopml",))
    costs = GUESS.costs
    per_page = costs.exit + costs.fast_fault + costs.walk_2d
    harvests = 3 * costs.exit  # one flush each interrupts the vCPU
    assert estimate(row, costs).stall * 3 == pytest.approx(toy.writes * per_page + harvests)


def test_the_stall_of_pml_is_a_log_entry_a_page_and_an_exit_for_512(toy):
    (row,) = profile(TraceWorkload(toy, backing="4k"), ("ept-pml",))
    costs, full = GUESS.costs, row.count("pml_full")
    harvests = 3 * 2 * costs.exit  # a kick before GET, a flush after it
    ref = toy.writes * (costs.pml_log + costs.walk_2d) + full * (costs.exit + costs.pml_full_exit) + harvests
    assert full > 0
    assert estimate(row, costs).stall * 3 == pytest.approx(ref)


def test_the_stall_of_a_ring_is_an_entry_a_page_and_with_pml_a_kick_to_userspace_a_harvest(toy):
    log = Log(ring_bytes=65536)
    rows = profile(TraceWorkload(toy, backing="4k"), ("ept-pml", "ept-nopml"), logs=(Log(), log))
    bitmap_pml, bitmap, ring_pml, ring = (estimate(row, GUESS.costs).stall * 3 for row in rows)
    costs = GUESS.costs
    assert [row.count("ring_full") for row in rows] == [0] * 4
    assert ring == pytest.approx(bitmap + toy.writes * costs.ring_push)
    assert ring_pml == pytest.approx(bitmap_pml + toy.writes * costs.ring_push + 3 * costs.ring_full_exit)


def test_huge_pages_need_no_second_level_walk():
    (row,) = profile(PerfTest(bytes_per_vcpu=8 << 20, source="anonymous_thp"), ("ept-pml",))
    first, second = estimate(row, GUESS.costs).epochs
    assert first.stall < second.stall  # initially-set leaves huge pages until the first CLEAR


# -- the verdict ------------------------------------------------------------------------------------------------------------


def stalls_at(rows, costs):
    names_of = [", ".join(label) for label in labels([row.column for row in rows])]
    return dict(zip(names_of, ((each.stall, each.vmm) for each in (estimate(row, costs) for row in rows)), strict=True))


@pytest.mark.parametrize("suffix", ["", "-rmap"])
def test_the_verdict_is_the_column_of_least_stall_and_turns_where_it_says(toy, suffix):
    rows = profile(TraceWorkload(toy, vcpus=2), ("ept-pml" + suffix, "ept-nopml" + suffix), logs=LOGS)
    verdict, stalls = recommend(rows, GUESS), stalls_at(rows, GUESS.costs)
    assert verdict.stall == pytest.approx(min(stalls.values())[0]) == pytest.approx(stalls[verdict.best][0])
    for name, (stall, _) in stalls.items():
        assert (name in (verdict.best, *verdict.alike)) == (stall <= verdict.stall * 1.01)
    assert verdict.next_stall == pytest.approx(min(stall for stall, _ in stalls.values() if stall > verdict.stall * 1.01))
    assert [part.stall for part in verdict.parts] == sorted(part.stall for part in verdict.parts)
    assert verdict.turns
    for turn in verdict.turns:
        assert turn.item in ITEMS
        assert 0 <= turn.then <= FARTHEST * turn.now
        moved = stalls_at(rows, dataclasses.replace(GUESS.costs, **{turn.item: turn.then}))
        assert min(moved, key=moved.get) == turn.best
        assert turn.best not in (verdict.best, *verdict.alike)
        back = stalls_at(rows, dataclasses.replace(GUESS.costs, **{turn.item: turn.now + 0.99 * (turn.then - turn.now)}))
        assert min(back, key=back.get) in (verdict.best, *verdict.alike)


def test_the_parts_of_a_stall_are_what_would_be_saved_without_each_cost(rows):
    for part in recommend(rows, GUESS).parts:
        assert sum(share for _, share in part.shares) == pytest.approx(1, abs=0.05)  # below 1 % is left out
        for item, share in part.shares:
            without = stalls_at(rows, dataclasses.replace(GUESS.costs, **{item: 0.0}))[part.name][0]
            assert share == pytest.approx(1 - without / part.stall, abs=1e-6)


def test_columns_with_equal_counts_are_as_good(capsys, path):
    _, out, _ = spte(capsys, path, "--platform", "ept-pml", "--platform", "npt-pml", "--platform", "npt", "--cost", "guess", "--recommend")
    assert "recommended (estimated): ept-pml, " in out
    assert "; next is npt with " in out
    assert "  as good, within 1%: npt-pml\n" in out


def test_a_column_that_loses_pages_is_not_recommended(toy):
    rows = profile(TraceWorkload(toy), ("npt",), logs=(Log(3, 16384), Log()))
    verdict = recommend(rows, GUESS)
    assert (verdict.best, verdict.refused) == ("bitmap", ("ring=16K,initially-set",))
    assert recommend(rows[:1], GUESS) is None


def test_the_command_says_the_verdict_in_words_and_in_json(capsys, path):
    argv = [path, "--platform", "ept-pml", "--platform", "ept-nopml", "--cost", "guess", "--recommend"]
    _, out, _ = spte(capsys, *argv)
    verdict = json.loads(spte(capsys, *argv, "--json")[1])["verdict"]
    assert verdict["best"] == "ept-pml" == verdict["parts"][0]["name"]
    assert max(verdict["parts"][0]["shares"], key=verdict["parts"][0]["shares"].get) == "pml_log"
    said = f"recommended (estimated): ept-pml, {verdict['stall'] / 1e6:.3g} ms of guest stall an epoch; next is ept-nopml with"
    assert said in out
    assert "it would be ept-nopml if pml_log is above" in out
    _, out, _ = spte(capsys, path, "--platform", "npt", "--log", "ring=16K,initially-set", "--cost", "guess", "--recommend")
    assert "every column loses pages: none is recommended" in out


@pytest.mark.parametrize("name", names())
def test_every_profile_that_ships_can_be_named(capsys, path, name):
    code, out, _ = spte(capsys, path, "--platform", "npt", "--cost", name)
    assert code == 0
    assert f"estimated at the costs of {name}" in out


def test_no_label_of_a_count_belongs_to_one_way_to_log():
    assert not [m.label for m in COUNTS if re.search(r"GET|CLEAR|RESET|bitmap", m.label)]
