"""Two columns on one workload: what differs and nothing else, and the first operation after which SPTEs do."""

import json

import commandline
import numpy as np
import pytest

from spte._numba import jit as _jit
from spte.diff import diff
from spte.diff.tables import digest, leaves
from spte.observe import listing
from spte.policy import parse
from spte.profile.columns import Column, Log
from spte.profile.phases import Plan, Run
from spte.profile.workload import TraceWorkload
from spte.trace import Trace, save

LOGS = (Log(), Log(1), Log(3), Log(ring_bytes=16384))
PLATFORMS = ("ept-pml", "ept-nopml", "ept-noad", "npt", "ept-pml-rmap", "npt-rmap")


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(11)
    pages = [np.flatnonzero(rng.random(2048) < share) for share in (0.2, 0.05)]
    bounds = np.cumsum([0, *map(len, pages)])
    return Trace(np.arange(3) * 10_000_000, bounds, np.concatenate(pages).astype(np.uint32), 2048, {"command": "a toy"})


@pytest.fixture(scope="module")
def path(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "toy.npz"
    save(toy, path)
    return str(path)


@pytest.fixture(autouse=True)
def _warm(monkeypatch):
    monkeypatch.setattr(_jit, "is_warm", lambda: True)


def side(platform="ept-pml", policy="6.12", log=LOGS[0]):
    return Column(platform, parse(policy), log, "thp")


def changes(found):
    return {(change.operation, change.name): (change.a, change.b) for change in found.changes}


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_column_does_not_differ_from_itself(toy, platform, log):
    found = diff(TraceWorkload(toy), side(platform, log=log), side(platform, log=log))
    assert (found.changes, found.sptes, found.any, found.comparable) == ((), None, False, True)


def test_recovery_in_place_saves_zaps_flushes_and_the_faults_of_the_retouch(toy):
    found = diff(TraceWorkload(toy), side(), side(policy="6.13"))
    assert changes(found) == {
        ("disable", "zapped"): (2048, 0), ("disable", "flushes"): (4, 1),
        ("retouch", "sptes_written"): (4, 0), ("retouch", "faults_slow"): (4, 0), ("retouch", "exits"): (5, 1),
    }  # fmt: skip
    assert (found.sptes.operation, found.sptes.epoch, found.sptes.a) == ("disable", 0, "no leaf")
    assert found.sptes.b.startswith("level 2, 4 from gfn 0x0")


def test_split_on_fault_moves_work_from_enabling_to_faults(toy):
    found = changes(diff(TraceWorkload(toy), side(), side(policy="6.12,eager_page_split=N")))
    assert found["enable", "splits_2m"] == (4, 0)
    assert found["fault", "splits_2m"] == (0, 4)
    assert found["fault", "faults_slow"] == (0, 4)
    assert not [key for key in found if key[0] in ("populate", "GET", "disable", "retouch")]


def test_a_decision_on_another_operation_shows_there_first(toy):
    """Initially-set: 5.13 write-protects huge leaves when it enables, 5.14 leaves that to CLEAR."""
    found = diff(TraceWorkload(toy), side(policy="5.13", log=Log(3)), side(policy="5.14", log=Log(3)))
    assert changes(found)["enable", "sptes_written"] == (4, 0)
    assert found.sptes.operation == "enable"


def test_layouts_of_versions_are_no_difference(toy):
    """From 6.10 on, suppress-#VE is set in entries of EPT, and in those of NPT that are not present."""
    for platform in ("ept-pml", "npt", "npt-rmap"):
        found = diff(TraceWorkload(toy), side(platform, "6.9"), side(platform, "6.10"))
        assert found.sptes is None, platform


@pytest.mark.parametrize("other", ["npt", "ept-noad"])
def test_platforms_with_other_layouts_have_counts_compared_alone(toy, other):
    found = diff(TraceWorkload(toy), side(), side(other))
    assert (found.comparable, found.sptes, found.any) == (False, None, True)
    assert changes(found)["fault", "pml_entries"] == (toy.writes, 0)


def test_any_changed_entry_changes_the_digest_and_a_frame_does_not(toy):
    run = Run(TraceWorkload(toy), side(), Plan())
    with run.vm as vm:
        for access in TraceWorkload(toy).populate():
            vm.vcpus[access.vcpu].write(access.gfns)
        before, mapped = digest(vm), leaves(vm)
        assert [(leaf.level, leaf.gfn, leaf.entries) for leaf in mapped] == [(2, 0, 4)]
        assert digest(vm) == before
        tables = vm.mmu.tables
        walked = listing.walk(tables, int(vm.vcpus[0].arrays.vcpu[0].root))
        (row,) = (run.value for run in walked if (run.what, run.level) == ("table", 2))
        spte = tables.sptes[row, 2]
        for bit, changed in ((1, True), (9, True), (30, False)):
            tables.sptes[row, 2] = spte ^ np.uint64(1 << bit)
            assert (digest(vm) != before) == changed
        tables.sptes[row, 2] = spte


# -- the command ----------------------------------------------------------------------------------------------------------------


def spte(capsys, *argv):
    return commandline.spte(capsys, "diff", *argv)


def test_the_command_prints_what_differs_and_where_first(capsys, path):
    code, out, err = spte(capsys, "6.12", "6.13", path)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].split() == ["operation", "count", "6.12", "6.13"]
    assert ["disable", "zapped", "2,048", "0"] in [line.split() for line in lines]
    assert lines[-1].startswith("SPTEs differ first after disable: 6.12 has no leaf, 6.13 has level 2, 4 from gfn 0x0")
    code, out, _ = spte(capsys, "6.12", "6.13", path, "--json")
    report = json.loads(out)
    assert (code, report["schema"]) == (1, "spte-diff/1")
    assert (report["a"]["policy"], report["b"]["policy"]) == ("6.12", "6.13")
    assert {"operation": "disable", "name": "zapped", "a": 2048, "b": 0} in report["changes"]
    assert "| disable | zapped | 2,048 | 0 |" in spte(capsys, "6.12", "6.13", path, "--markdown")[1]


def test_equal_sides_are_exit_code_0(capsys, path):
    assert spte(capsys, "6.1", "6.12", path) == (0, "no count differs\nSPTEs are equal after every operation\n", "")


def test_platforms_are_compared_under_one_policy_or_two(capsys, path):
    for policies in ([], ["6.12"], ["6.12", "6.12"]):
        code, out, _ = spte(capsys, *policies, path, "--platform", "ept-pml", "npt", "--log", "ring=16K", "--vcpus", "2")
        assert code == 1
        assert out.splitlines()[0].split() == ["operation", "count", "ept-pml", "npt"]
        assert "SPTEs are not compared: those of ept-pml and npt have different layouts" in out
    _, out, _ = spte(capsys, "6.12", "6.13", path, "--platform", "ept-pml", "ept-nopml")
    assert "ept-nopml 6.13" in out.splitlines()[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "0 arguments; take two policies"),
        (["6.12"], "1 arguments; take two policies"),
        (["6.12", "6.13", "a", "b"], "4 arguments"),
        (["6.12", "npt"], "'npt' is not known; known are series"),
        (["6.12", "6.13", "no.npz"], "no.npz: can not be read"),
        (["6.12,eager=N", "6.13"], "'eager=N' is not FIELD=VALUE"),
        (["--platform", "npt", "vmx"], "'vmx' is not known"),
        (["--platform", "npt", "npt", "a", "b"], "'a' is no policy"),
        (["6.12", "6.13", "--log", "wp"], "'wp' is no way to log"),
        (["6.12", "6.13", "--memory", "1M"], "1048576"),
        (["6.12", "6.13", "--vcpus", "0"], "vcpus=0"),
        (["5.10", "6.13", "--log", "ring=64K"], "5.10 has no dirty rings"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, argv, said):
    code, out, err = spte(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
