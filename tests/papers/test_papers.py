"""Published experiments: the data is whole, the model's counts are the kernel's, the fit finds costs, errors are printed as they are."""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import commandline
import numpy as np
import pytest

from spte._numba import jit as _jit
from spte.cli.app import run as command
from spte.cli.verbs import papers as verb
from spte.cost import CostError, dump, load, names
from spte.cost.costs import ITEMS
from spte.papers import MACHINES, Experiment, PapersError, Run, compare, experiments, fit, perform
from spte.papers.compare import verdict
from spte.papers.fit import Measured, nonnegative_least_squares
from spte.papers.model import counted, guest_table_pages, phase_of, seconds
from spte.papers.published import FIT, PREDICTION, REPORTED
from spte.policy import parse
from spte.profile.perf_test import PerfTest

GUESS = load("guess")
README = (Path(__file__).parents[2] / "README.md").read_text()
DOCUMENT = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()
FITTED = MACHINES["matlack"].items
ALL = {each.name: each for each in experiments()}
SMALL = {"vcpus": 2, "bytes_per_vcpu": 8 << 20, "source": "anonymous_hugetlb_2mb"}


def made(label, options, **given):
    return Run(label, "ept-pml", "6.12", {**SMALL, **options}, **{"seconds": {}, "unpredicted": {}, "counts": {}, "before": None, **given})


# -- what was published -----------------------------------------------------------------------------------------------------


def test_two_are_fitted_four_predicted_one_reported():
    roles = {role: [each.name for each in ALL.values() if each.role == role] for role in (FIT, PREDICTION, REPORTED)}
    assert roles == {FIT: ["F1", "F3"], PREDICTION: ["F2", "F4", "F5", "F7"], REPORTED: ["F6"]}


@pytest.mark.parametrize("each", ALL.values(), ids=lambda each: each.name)
def test_every_run_can_be_made_and_names_its_forerunner(each):
    labels = [run.label for run in each.runs]
    assert len(set(labels)) == len(labels) > 0
    assert each.source
    assert each.date
    for run in each.runs:
        PerfTest(**run.options, iterations=run.iterations)
        parse(run.policy)
        assert run.before is None or run.before in labels[: labels.index(run.label)]
        assert all(value > 0 for value in (*run.seconds.values(), *run.unpredicted.values(), *run.counts.values()))
        assert not set(run.seconds) & set(run.unpredicted)
        for phase in run.seconds:
            kind, _, iteration = phase.partition(" ")
            assert (kind in ("dirty", "get", "clear")) == bool(iteration)


def test_what_the_model_can_not_predict_is_said():
    assert all(each.missing for each in ALL.values() if each.role != FIT)


def test_an_unknown_experiment_lists_what_there_is():
    with pytest.raises(PapersError, match="'F9' is not known; take one of F1, F2, F3"):
        experiments("F1", "F9")


# -- counts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "flushes"), [("6.12", 8), ("6.13", 1)])
def test_a_collapse_flushes_each_region_or_once_and_recovery_in_place_saves_the_fault(policy, flushes):
    row = perform(made("a", {"run_while_disabling": True})._replace(policy=policy))
    tables = 8 + 1 + 1 + 1  # of the guest: one for each 2 MiB, and one of each level above
    assert counted(row) == {"flushes": flushes, "faults": {"6.12": 2 * 8, "6.13": 8}[policy] + tables}
    assert row.dropped(phase_of(row, "disable")) == 8 * 512


def test_the_guests_tables_map_its_memory_at_4_kib():
    assert guest_table_pages(512) == 4
    assert guest_table_pages(64 << 20) == (64 << 20) // 512 + 256 + 1 + 1  # 64 vCPUs of 4 GiB


def test_a_dirty_phase_lasts_as_long_as_its_slowest_vcpu():
    run = made("a", {"no_manual_protect": True})
    row = perform(run)
    ns = GUESS.costs.pml_log + GUESS.costs.walk_2d
    full = 2048 // 512 - 1
    ref = 2048 * ns + full * (GUESS.costs.exit + GUESS.costs.pml_full_exit)
    assert seconds(run, row, "dirty 1", GUESS.costs) == pytest.approx(ref * 1e-9)


def test_vcpus_run_while_logging_is_disabled_only_if_told_to():
    slow = dataclasses.replace(GUESS.costs, flush_vcpu=1e9)
    still, running = (made("a", {"run_while_disabling": e}) for e in (False, True))
    times = [seconds(run, perform(run), "disable", slow) for run in (still, running)]
    assert times[0] < 1
    assert times[1] == pytest.approx(times[0] + 8 * 2, rel=1e-3)


# -- the fit --------------------------------------------------------------------------------------------------------------------


def test_least_squares_stay_above_0():
    rng = np.random.default_rng(3)
    a = rng.random((30, 6))
    x = np.array([0, 1, 2, 0, 0.5, 3.0])
    assert nonnegative_least_squares(a, a @ x) == pytest.approx(x, abs=1e-9)
    b = a @ np.array([-1, 1, 2, -2, 0.5, 3.0])
    found = nonnegative_least_squares(a, b)
    assert (found >= 0).all()
    gradient = a.T @ (b - a @ found)  # Karush, Kuhn and Tucker: 0 where the cost is free, not above 0 where it is held at 0
    assert gradient[found > 0] == pytest.approx(0, abs=1e-9)
    assert (gradient[found == 0] <= 1e-9).all()


def test_the_fit_finds_the_costs_that_made_the_times():
    true = dataclasses.replace(GUESS.costs, **{item: 1.5 * getattr(GUESS.costs, item) for item in FITTED})
    options = [
        {"no_manual_protect": True}, {"no_manual_protect": True, "write_percent": 5}, {}, {"vcpus": 4, "no_manual_protect": True},
        {"vcpus": 8, "write_percent": 50, "no_manual_protect": True},
    ]  # fmt: skip
    times_of = []
    for policy in ("6.12", "6.12,eager_page_split=N", "6.2,eager_page_split=N"):
        for option in options:
            bare = made("a", option)._replace(policy=policy)
            row = perform(bare)
            names = [f"{p.kind} {p.iteration}".removesuffix(" 0") for p in row.phases if p.kind in ("enable", "dirty", "clear")]
            times = {phase: seconds(bare, row, phase, true) for phase in names}
            run = bare._replace(seconds={phase: time for phase, time in times.items() if time})
            times_of += [Measured(run, row, phase) for phase in run.seconds]
    fitted = fit("matlack", times_of, GUESS)
    for item in ITEMS:
        assert getattr(fitted.costs, item) == pytest.approx(getattr(true, item), rel=1e-6), item
    assert set(fitted.guesses) == set(GUESS.guesses) - set(FITTED)
    assert "F1: " in fitted.origins["split"].source


# -- the comparison ---------------------------------------------------------------------------------------------------------------


def toy(role=PREDICTION, factor=1.0):
    bare = made("before", {})
    row = perform(bare)
    times = {phase: factor * seconds(bare, row, phase, GUESS.costs) for phase in ("clear 1", "clear 2")}
    before = bare._replace(seconds=times, counts={"flushes": 8})
    after = before._replace(label="after", before="before", seconds={"clear 2": times["clear 2"] / 3}, unpredicted={"populate": 2.5})
    about = Experiment("X1", "a toy", "nobody", "2026-01", "none", role, ("nothing",), (before, after))
    return about, {"before": row, "after": row}


def test_a_comparison_has_every_time_its_error_and_the_ratio_to_the_run_before():
    about, rows = toy(factor=1.5)
    found = compare(about, rows, GUESS.costs)
    first, second, third = found.lines
    assert [round(line.factor, 6) for line in found.lines] == [round(1 / 1.5, 6), round(1 / 1.5, 6), 2.0]
    assert first.to_before is None
    assert third.to_before == pytest.approx((1 / 3, 1))
    assert (first.holds, second.holds, third.run) == (True, True, "after")
    assert first.ns_a_page == pytest.approx((first.published - first.estimated) * 1e9 / 4096)
    assert found.typical == pytest.approx((1.5 * 1.5 * 2) ** (1 / 3))
    assert [line.estimated for line in found.counts] == [8, 8]


@pytest.mark.parametrize(
    ("role", "factor", "holds"), [(PREDICTION, 1.0, True), (PREDICTION, 9.0, False), (FIT, 9.0, None), (REPORTED, 9.0, None)]
)
def test_only_predictions_are_judged(role, factor, holds):
    about, rows = toy(role, factor)
    found = compare(about, rows, GUESS.costs)
    assert found.holds is holds
    if holds is not None:
        assert verdict([found]) == f"{int(holds)} of 1 predictions hold within a factor of 2: {'X1' if holds else 'none; X1 not'}"


# -- the document ---------------------------------------------------------------------------------------------------------------


def test_the_example_of_the_document_is_a_profile_but_for_what_it_leaves_out(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(example)
    with pytest.raises(CostError, match=r"slow_fault_shared, shared_contention, .* missing") as error:
        load(path)
    assert not {"exit,", "fast_fault,"} & set(str(error.value).split())


@pytest.mark.skipif(_jit.PLAIN, reason="millions of accesses in plain Python")
def test_every_command_of_the_document_runs(capsys, monkeypatch):
    monkeypatch.setattr(_jit, "is_warm", lambda: True)
    (block,) = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    for line in block.splitlines():
        assert command(shlex.split(line)[1:]) == 0
        out = capsys.readouterr().out
        assert "stimated" in out
        if "--recommend" in line:
            shown = re.search(r"<!-- the verdict .*?-->\n```text\n(.*?)```", DOCUMENT, re.DOTALL)[1]
            assert out.endswith(f"\n\n{shown}")
            assert f"{line}\n```" in README
            assert f"```text\n{shown}```" in README


def test_the_document_names_every_profile_that_ships():
    assert all(f"`{name}`" in DOCUMENT for name in names())


# -- the command --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """All experiments, with 2 vCPUs of 8 MiB in 2 MiB pages in place of their sizes."""
    monkeypatch.setattr(_jit, "is_warm", lambda: True)

    def shrunk(*names):
        found = experiments(*names)
        return tuple(each._replace(runs=tuple(run._replace(options={**run.options, **SMALL}) for run in each.runs)) for each in found)

    monkeypatch.setattr(verb, "experiments", shrunk)


def spte(capsys, *argv):
    return commandline.spte(capsys, "papers", *argv)


def test_every_published_time_is_printed_and_a_misfit_is_no_error(capsys, tiny):
    code, out, err = spte(capsys, "--cost", "guess")
    assert (code, err) == (0, "")
    for each in ALL.values():
        role = REPORTED if each.role == REPORTED else PREDICTION  # with --cost nothing is fitted
        assert f"{each.name}, {role}: {each.title}" in out
        assert all(f"not in the model: {missing}\n" in out for missing in each.missing)
    times = sum(len(run.seconds) + len(run.unpredicted) + len(run.counts) for each in ALL.values() for run in each.runs)
    lines = [line for line in out.splitlines() if line.startswith(tuple(run.label for each in ALL.values() for run in each.runs))]
    assert len(lines) == times
    assert " !" in out
    assert "costs of guess: " in out
    assert "of 6 predictions hold" in out


def test_json_and_markdown_hold_the_same(capsys, tiny):
    report = json.loads(spte(capsys, "--figure", "F5", "--figure", "F7", "--cost", "guess", "--json")[1])
    assert report["schema"] == "spte-papers/1"
    assert [each["name"] for each in report["experiments"]] == ["F5", "F7"]
    _, out, _ = spte(capsys, "--figure", "F5", "--cost", "guess", "--markdown")
    (before, after) = (line for line in report["experiments"][0]["times"])
    assert f"| zap, a flush each | disable | 14.33 s | {before['estimated']:.4g} s |" in out
    assert f"| in place, batched | disable | 4.795 s | {after['estimated']:.4g} s |" in out


def test_fitted_costs_are_saved_and_taken_again(capsys, tiny, tmp_path):
    path = tmp_path / "mine.toml"
    code, out, _ = spte(capsys, "--figure", "F7", "--save", path)
    assert code == 0
    assert "costs of matlack: machine of F1 and F3 (unnamed, up to 2 vCPUs): fitted by spte papers" in out
    saved = load(path)
    assert set(saved.guesses) == set(GUESS.guesses) - set(FITTED)
    again = json.loads(spte(capsys, "--figure", "F7", "--cost", path, "--json")[1])
    fitted = json.loads(spte(capsys, "--figure", "F7", "--json")[1])
    for a, b in zip(again["experiments"][0]["times"], fitted["experiments"][0]["times"], strict=True):
        assert a["estimated"] == pytest.approx(b["estimated"], rel=1e-3)  # a file has four digits


def test_what_another_machine_is_fitted_on_is_no_prediction(capsys, tiny):
    roles = {}
    for machine in MACHINES:
        report = json.loads(spte(capsys, "--fit", machine, "--json")[1])
        roles[machine] = {each["name"] for each in report["experiments"] if each["role"] == FIT}
        assert set(report["costs"]["guesses"]) == set(GUESS.guesses) - set(MACHINES[machine].items)
    assert roles == {"matlack": {"F1", "F3"}, "skylake": {"F4"}, "haswell": {"F4"}}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--fit", "epyc"], "'epyc'"),
        (["--figure", "F9"], "'F9' is not known; take one of F1"),
        (["--cost", "mine"], "there is no cost profile 'mine'"),
        (["--cost", "guess", "--save", "a.toml"], "with --cost none are fitted"),
        (["--save", "a.txt"], "does not end in .toml"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, argv, said):
    code, out, err = spte(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.long
@pytest.mark.skipif(_jit.PLAIN, reason="billions of accesses in plain Python")
def test_at_real_sizes_three_predictions_hold_the_document_says_so_and_the_profiles_that_ship_are_the_fits(capsys, tmp_path, monkeypatch):
    performed, rows = verb._perform, {}

    def once(wanted):
        rows.update(performed([each for each in wanted if each.name not in rows]))
        return rows

    monkeypatch.setattr(verb, "_perform", once)
    for machine in ("skylake", "haswell"):
        path = tmp_path / f"{machine}.toml"
        assert spte(capsys, "--figure", "F4", "--fit", machine, "--save", path)[0] == 0
        assert path.read_text() == dump(load(machine))
    path = tmp_path / "matlack.toml"
    report = json.loads(spte(capsys, "--json", "--save", path)[1])
    assert path.read_text() == dump(load("matlack"))
    shown = re.search(r"<!-- spte papers --summary --markdown -->\n(.*?)<!-- end -->", DOCUMENT, re.DOTALL)[1]
    assert spte(capsys, "--summary", "--markdown")[1].startswith(shown)
    by_name = {each["name"]: each for each in report["experiments"]}
    assert [name for name, each in by_name.items() if each["holds"]] == ["F4", "F5", "F7"]
    flushes = {line["run"]: line["estimated"] for line in by_name["F5"]["counts"] if line["what"] == "flushes"}
    assert flushes == {"zap, a flush each": 131_072, "in place, batched": 1}
    faults = {line["run"]: line for line in by_name["F5"]["counts"] if line["what"] == "faults"}
    assert [round(line["published"] / 131_072) for line in faults.values()] == [3, 2]
    assert [round(line["estimated"] / 131_072) for line in faults.values()] == [3, 2]
    assert all(0 < line["published"] - line["estimated"] < 3 * 64 for line in faults.values())  # code and stacks of 64 vCPUs
    for each in by_name.values():
        logs = [abs(math.log(line["factor"])) for line in each["times"]]
        assert each["typical"] == pytest.approx(math.exp(sum(logs) / len(logs)))
