"""Policies by version: each decision as of that version, stable releases, unknown versions, and what a decision rests on."""

import itertools
import json
from functools import cache
from pathlib import Path

import pytest

import spte
from spte import policy
from spte.check.holders import differs, with_other_values
from spte.policy import HOLDERS, NAMES, RECORDED, SERIES, VERSIONS, Policy, changes, decisions, evidence, spell
from spte.recording.file import read_all

GOLDEN = Path(__file__).parent.parent / "golden"
HELD = json.loads(HOLDERS.read_text())


def values(name):
    return {f.name: getattr(Policy.named(name), f.name) for f in decisions()}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_decision_has_the_value_of_its_last_change(version):
    at = VERSIONS.index(version)
    for name, value in values(version).items():
        last = [c for c in changes(name) if VERSIONS.index(c.version) <= at][-1]
        assert value == last.value


@pytest.mark.parametrize("decision", [f.name for f in decisions()])
def test_changes_of_a_decision_are_in_order_and_each_changes_something(decision):
    found = changes(decision)
    at = [VERSIONS.index(c.version) for c in found]
    assert at == sorted(set(at))
    assert at[0] == 0
    assert all(a.value != b.value for a, b in itertools.pairwise(found))
    assert all(c.source for c in found)


def test_names_are_those_of_policies_that_differ():
    versions = [name for name in NAMES if name != SERIES]
    assert all(values(a) != values(b) for a, b in itertools.pairwise(versions))
    for version in set(VERSIONS) - set(versions):
        before = VERSIONS[VERSIONS.index(version) - 1]
        assert values(version) == values(before)


@pytest.mark.parametrize(("release", "version"), [("6.8", "6.8"), ("6.8.12", "6.8"), ("5.10.223", "5.10"), ("7.2.12", "7.2")])
def test_a_stable_release_finds_its_mainline_policy(release, version):
    assert Policy.named(release) == Policy.named(version)
    assert Policy.named(release).name == version


@pytest.mark.parametrize(
    ("name", "near"), [("5.9", "5.10"), ("4.19.300", "5.10"), ("5.20", "5.19"), ("6.25", "6.19"), ("7.3", "7.2"), ("99.1.2", "7.2")]
)
def test_an_unknown_version_is_refused_with_the_nearest(name, near):
    with pytest.raises(spte.KvmError) as caught:
        Policy.named(name)
    assert str(caught.value) == (
        f"EINVAL: policy {name!r} is not known; the nearest is {near}; known are series, any mainline version from 5.10 to 7.2"
    )


@pytest.mark.parametrize("name", ["", "six", "6", "6.8-rc1", "6.8.1.2", "-5.10", "5.10 "])
def test_what_is_no_version_is_refused_without_one(name):
    with pytest.raises(spte.KvmError, match="is not known; known are series"):
        Policy.named(name)


def test_evidence_of_a_recorded_version_is_its_own_recordings_where_they_tell():
    for version in RECORDED:
        for row in evidence(version):
            told = HELD.get(row.decision, {}).get(version, {})
            if told and row.before == row.after == version:
                assert row.recorded
                assert row.recordings == (next(iter(told.values())),)
            else:
                assert version not in (row.before, row.after)


def test_evidence_between_recordings_is_theirs_where_nothing_changed():
    rows = {row.decision: row for row in evidence("6.8")}
    assert (rows["collapse"].before, rows["collapse"].after) == ("6.1", "6.12")
    assert rows["collapse"].recorded
    assert len(rows["collapse"].recordings) == 2
    assert rows["collapse"].value == "zap-table"
    assert not rows["fault_split"].recorded  # 6.1 zaps, 6.12 splits: that 6.8 splits too is known of a commit
    assert rows["fault_split"].since == "6.3"
    assert not rows["pageout"].recorded
    assert not rows["sync_kicks_without_pml"].recorded  # nothing that is compared shows it
    assert rows["sync_kicks_without_pml"].recordings == ()
    with pytest.raises(spte.KvmError, match=r"version '6.20' is not known; the nearest is 6.19"):
        evidence("6.20")


def test_a_value_between_two_equal_recordings_that_was_another_is_of_a_commit():
    rows = {row.decision: row for row in evidence("5.11")}
    assert Policy.named("5.10").collapse_pages == Policy.named("5.12").collapse_pages == "compound-or-device"
    assert (rows["collapse_pages"].value, rows["collapse_pages"].recorded) == ("thp", False)


def test_the_recorded_versions_are_those_of_the_recordings():
    kernels = {path.name.split("-")[0] for path in GOLDEN.glob("*.tar.xz")}
    assert kernels <= set(RECORDED)
    assert policy.mainline("6.12.117") == "6.12"


def test_a_running_kernel_finds_its_mainline_version():
    for release in ("6.12.117", "6.12.0-13-amd64", "6.12.0+", "6.12.87.2-microsoft-standard-WSL2", "6.12-rc3"):
        assert policy.running(release) == "6.12", release
    for release in ("", "6", "linux-6.12", "4.19.0-27-amd64", "6.123.0"):
        assert policy.running(release) is None, release


TOLD = [
    pytest.param(decision, version, other, name, id=f"{decision} {version} {other}")
    for decision, versions in HELD.items() for version, told in versions.items() for other, name in told.items()
]  # fmt: skip


@cache
def archive(name):
    return {r.header["scenario"]: r for r in read_all(GOLDEN / f"{name}.tar.xz")}


@pytest.mark.long
@pytest.mark.parametrize(("decision", "version", "other", "name"), TOLD)
def test_a_recording_differs_if_its_kernel_decided_otherwise(decision, version, other, name):
    recording = archive(name.split("/")[0])[name.split("/")[1]]
    values = {spell(getattr(p, decision)): p for p in with_other_values(version, decision)}
    assert differs(recording, values[other])
    assert not differs(recording, Policy.named(version))
