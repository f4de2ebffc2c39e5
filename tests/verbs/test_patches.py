"""`spte patches`: every scenario of the 14 patches, the enable/disable matrix, the series on a trace, and the page that shows them."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import commandline
import numpy as np
import pytest

from spte._numba import jit as _jit
from spte.cli.app import run
from spte.cli.verbs import patches as verb
from spte.patches import logging as patch_logging
from spte.patches import mapping as patch_mapping
from spte.patches import recorded
from spte.patches.groups import of_patches, of_versions
from spte.patches.states import PATCHES, STATES, around
from spte.patches.trial import COUNTS, Outcome, Scenario, perform
from spte.patches.versions import MATRIX, VERSIONS, on_trace
from spte.policy import Policy, decisions, spell
from spte.recording.file import RecordingError
from spte.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"
SCENARIOS = patch_mapping.SCENARIOS | patch_logging.SCENARIOS
ALL = [scenario for scenarios in SCENARIOS.values() for scenario in scenarios]


def toy_trace():
    gfn = np.r_[0:700, 100:200, 512:1024]
    bounds = np.array([0, 10, 20, 30]) * 1_000_000
    return Trace(bounds, np.array([0, 700, 800, 1312]), gfn.astype(np.uint32), 1024, {"command": "a toy"})


def name_of(scenario):
    return f"{scenario.name}: {scenario.claim}"


def must_be_as_specified(scenario):
    outcome = perform(scenario)
    assert outcome.differences == []
    return outcome


@pytest.mark.parametrize("scenario", ALL, ids=name_of)
def test_patch(scenario):
    must_be_as_specified(scenario)


@pytest.mark.parametrize("scenario", MATRIX, ids=name_of)
def test_matrix(scenario):
    must_be_as_specified(scenario)


def test_the_series_loses_no_page_of_a_trace():
    everything = {}
    for scenario in on_trace(toy_trace()):
        outcome = must_be_as_specified(scenario)
        everything.setdefault(scenario.platform, outcome)
    assert everything
    for versions in everything.values():
        zapped = [seen["zapped"] for seen in versions.seen]
        assert zapped[0] > 0
        assert zapped[-1] == 0  # 6.13 recovers in place


# -- what the scenarios rest on


def test_the_patches_one_after_the_other_make_5_11_the_series():
    by_name = {f.name for f in decisions()}
    series, last = Policy.named("series"), STATES[-1]
    assert [n for n in by_name if getattr(series, n) != getattr(last, n)] == []
    assert len(STATES) == len(PATCHES) + 1 == 15
    decided = [p.decision for p in PATCHES if p.decision]
    lost_in_5_12 = [n for n in decided if getattr(series, n) != getattr(Policy.named("5.12"), n)]
    assert lost_in_5_12 == [PATCHES[1].decision]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: f"patch {p.number}")
def test_a_patch_changes_its_one_decision_and_nothing_else(patch):
    without, with_ = around(patch.number)
    changed = [f.name for f in decisions() if getattr(without, f.name) != getattr(with_, f.name)]
    assert changed == ([patch.decision] if patch.decision else [])
    assert patch.number in SCENARIOS or patch.decision is None


def test_the_scenarios_are_those_of_the_specification():
    ref = ["P1-a", "P1-b", "P1-c", "P2-a", "P2-b", "P2-c", "P3", *(f"P5-{c}" for c in "abcdef"), *(f"P6-{c}" for c in "abc"), "P9-a"]
    ref += [f"P10-{c}" for c in "abc"] + [f"P11-{c}" for c in "abcdef"] + [f"P12-{c}" for c in "abc"] + ["P13"]
    assert {scenario.name.split()[0] for scenario in ALL} == set(ref)  # what follows the name is a platform
    assert all(name.startswith(f"P{number}") for number, group in SCENARIOS.items() for name in (s.name for s in group))


@pytest.mark.parametrize("number", [1, 2, 5, 6, 9, 11, 12])
def test_a_patch_whose_decision_is_not_taken_is_noticed(number):
    """Under the old decision on both sides at least one scenario of the patch is not as specified."""
    unpatched = [dataclasses.replace(s, policies=(s.policies[0],) * len(s.policies)) for s in SCENARIOS[number]]
    assert any(outcome.differences for outcome in map(perform, unpatched))


def test_a_wrong_value_is_named_with_its_policy_and_what_was_expected():
    scenario = Scenario("X", "nothing happens", VERSIONS[:2], lambda t: None, {"zapped": (0, 7), "flushes": (None, None)})
    outcome = perform(scenario)
    assert outcome.differences == ["zapped under series: 0, expected 7"]
    assert not outcome.as_specified


# -- the page


@functools.cache
def all_groups():
    return of_patches() + of_versions(toy_trace())


@pytest.fixture(autouse=True)
def page(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(_jit, "is_warm", lambda: True)
    monkeypatch.setattr(verb, "default_trace", toy_trace)
    monkeypatch.setattr(verb, "of_patches", lambda numbers=range(1, 15): [all_groups()[n - 1] for n in numbers])
    monkeypatch.setattr(verb, "of_versions", lambda trace: all_groups()[14:])


def spte(capsys, *argv):
    return commandline.spte(capsys, "patches", *argv)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_page_shows_every_patch_and_scenario_in_the_terminals_width(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = spte(capsys)
    assert max(map(len, out.splitlines())) <= columns
    for patch in PATCHES:
        assert re.search(rf"^Patch {patch.number}, {patch.commit}: ", out, re.MULTILINE)
        if patch.decision:
            before, after = (spell(getattr(p, patch.decision)) for p in around(patch.number))
            assert f"{patch.decision}: {before} → {after}\n" in out
    folded = re.sub(r"\s+", " ", out)
    assert all(f"{s.name}:" in folded for s in ALL)
    lines = [line for line in out.splitlines() if re.search(r"(yes|NO)$", line)]
    assert len(lines) == len(ALL) + len(MATRIX) + len(on_trace(toy_trace()))
    assert re.search(r"P5-c: .*1024→512  1024→512     2→1        1 +yes\n", out)
    assert "a toy; 4 MiB, 3 epochs" in out


def test_the_exit_code_says_whether_all_is_as_specified(capsys):
    for argv in ([], ["--patch", 6]):
        groups = all_groups()[5:6] if argv else all_groups()
        wrong = [text for g in groups for o in g.outcomes for text in o.differences]
        code, out, err = spte(capsys, *argv)
        assert code == bool(wrong)
        assert err.splitlines() == [line for line in err.splitlines() if line.startswith("spte patches: ")]
        assert len(err.splitlines()) == len(wrong)
        good = sum(o.as_specified for g in groups for o in g.outcomes)
        assert f"{good} of {sum(len(g.outcomes) for g in groups)} scenarios as specified" in out


@pytest.mark.parametrize("number", range(1, 15))
def test_one_patch_can_be_shown_alone(capsys, number):
    code, out, err = spte(capsys, "--patch", number)
    assert re.findall(r"^Patch (\d+)", out, re.MULTILINE) == [str(number)]
    assert ("no behaviour to measure" in out) == (number not in SCENARIOS)
    assert code == bool(err)


@pytest.mark.parametrize("number", ["0", "15", "five"])
def test_a_patch_that_does_not_exist_is_one_line(capsys, number):
    code, out, err = spte(capsys, "--patch", number)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert number in err


def test_a_difference_is_shown_on_the_page_and_in_the_exit_code(capsys, monkeypatch):
    wrong = dataclasses.replace(SCENARIOS[9][0], expected={"vcpu_kicks": (0, 3, 0)})
    monkeypatch.setitem(SCENARIOS, 9, [wrong])
    monkeypatch.setattr("spte.patches.groups._SCENARIOS", SCENARIOS)
    monkeypatch.setattr(verb, "of_patches", of_patches)
    code, out, err = spte(capsys, "--patch", 9)
    assert code == 1
    assert re.search(r"NO$", out, re.MULTILINE)
    assert err == "spte patches: P9-a: vcpu kicks under 5.11 + patches 1-9: 2, expected 3\n"


def test_the_json_holds_every_value_with_its_policy_and_expectation(capsys):
    code, out, _ = spte(capsys, "--json")
    report = json.loads(out)
    assert report["schema"] == verb.SCHEMA == "spte-patches/1"
    assert report["as_specified"] is (code == 0)
    assert [g["patch"] for g in report["groups"]] == [*range(1, 15), None, None]
    for group in report["groups"]:
        assert set(group) == {"title", "patch", "commit", "decision", "scenarios"}
        for s in group["scenarios"]:
            assert set(s) == {
                "scenario", "claim", "platform", "manual", "vcpus", "policies", "seen", "expected", "recorded", "as_specified",
                "differences",
            }  # fmt: skip
            assert s["as_specified"] is (s["differences"] == [])
            assert len(s["seen"]) == len(s["policies"])
            assert all(set(COUNTS) <= set(seen) for seen in s["seen"])
            assert all(len(values) == len(s["policies"]) for values in s["expected"].values())
    first = report["groups"][0]["scenarios"][0]
    assert (first["scenario"], [seen["zapped"] for seen in first["seen"]]) == ("P1-a", [0, 1024])


def test_two_runs_see_the_same():
    again = of_patches() + of_versions(toy_trace())
    assert [[o.seen for o in g.outcomes] for g in again] == [[o.seen for o in g.outcomes] for g in all_groups()]


def test_an_outcome_without_differences_is_as_specified():
    assert Outcome(Scenario("X", "", VERSIONS[:1], lambda t: None, {"zapped": (1,)}), ({"zapped": 1},)).as_specified


# -- what was recorded


def test_the_recorded_values_are_those_of_the_recordings():
    stored = json.loads(recorded.DATA.read_text())
    assert recorded.extract([GOLDEN]) == stored


def test_every_place_belongs_to_a_scenario_and_every_patch_that_shows_has_one():
    by_patch = {number: {s.name for s in scenarios} for number, scenarios in SCENARIOS.items()}
    assert recorded.PLACES.keys() <= set().union(*by_patch.values())
    assert {n for n, names in by_patch.items() if names & recorded.PLACES.keys()} >= {1, 2, 5, 6, 9, 10, 11, 12, 13}


def test_a_recording_that_is_missing_is_named(tmp_path):
    with pytest.raises(RecordingError, match=r"no recording of 5\.10-nested/intel-pml/n01-basic-ept, "):
        recorded.extract([tmp_path])


@pytest.mark.skipif(_jit.PLAIN, reason="minutes in plain Python")
def test_the_page_of_the_series_is_what_its_command_prints(capsys):
    assert run(["patches", "--markdown"]) == 0
    assert capsys.readouterr().out == (GOLDEN.parents[1] / "docs" / "series.md").read_text()
