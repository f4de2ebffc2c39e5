"""The cost profile of a host: what the steps are solved for, what stays a guess, and, where there is a KVM, the steps themselves."""

import os

import pytest

from spte import devkvm
from spte.calibrate import run as calibration
from spte.calibrate.run import HOW, measure, profile, solve
from spte.cli.app import run
from spte.cost import dump, load
from spte.cost.costs import ITEMS
from spte.devkvm import device
from spte.devkvm.device import NoKvmError, open_kvm
from spte.devkvm.host import Host
from spte.platform import named

COSTS = {"exit": 600.0, "fault": 900.0, "armed": 350.0, "clear": 20.0, "walk": 80.0, "get": 1.5, "enable": 3.0, "push": 15.0, "pml": 40.0}
HOST = Host("6.12.1", "intel-pml", {"tdp_mmu": "Y"}, "kvm_intel, ept=Y, pml=Y", True)


def timings(costs, platform, *, fast):
    """What the steps measure on a machine of those costs."""
    armed = costs["pml"] + costs["exit"] / 512 if platform.pml else costs["exit"] + (costs["armed"] if fast else costs["fault"])
    logged = {
        "first": costs["exit"] + costs["fault"], "armed": armed, "dense": costs["walk"] + 64 * costs["clear"],
        "sparse": costs["walk"] + costs["clear"], "cleared": costs["walk"] + 64 * costs["clear"],
    }  # fmt: skip
    words = {"enable": costs["enable"], "get": costs["get"]}
    return costs["exit"], logged, words, costs["clear"], 5120.0, armed + costs["push"]


@pytest.mark.parametrize(("name", "write", "slow"), [
    ("ept-pml", "pml_log", "slow_fault_shared"), ("ept-nopml", "fast_fault", "slow_fault_shared"),
    ("npt-rmap", "fast_fault", "slow_fault_exclusive"), ("shadow", "slow_fault_exclusive", "slow_fault_exclusive"),
])  # fmt: skip
def test_the_costs_of_a_machine_come_out_again(name, write, slow):
    platform = named(name)
    fast = name != "shadow"
    found = solve(platform, *timings(COSTS, platform, fast=fast), fast=fast)
    value = {"pml_log": COSTS["pml"], "fast_fault": COSTS["armed"], "slow_fault_exclusive": COSTS["fault"]}[write]
    assert found[write] == pytest.approx([value] * len(found[write]))
    assert found[slow] == pytest.approx([COSTS["fault"]] * (2 if write == slow else 1))
    assert found["exit"] == pytest.approx([COSTS["exit"]])
    assert found["clear_page"] == pytest.approx([COSTS["clear"]] * 3)
    assert found["mask_walk"] == pytest.approx([COSTS["walk"]])
    assert (found["get_word"], found["bitmap_word"]) == ([COSTS["get"]], [COSTS["enable"]])
    assert found["ring_push"] == pytest.approx([COSTS["push"]])
    assert found.get("zap") == (None if platform.tdp_mmu else [10.0])
    assert found.get("collapse_2m") == ([5120.0] if platform.tdp_mmu else None)
    assert set(found) <= set(HOW)


def test_an_exit_is_no_longer_than_a_fault_and_no_cost_is_negative():
    platform = named("shadow")
    slow_exit, *rest = timings(COSTS, platform, fast=False)
    found = solve(platform, 10 * slow_exit, *rest, fast=False)
    assert found["exit"] == [COSTS["exit"] + COSTS["fault"]]
    assert found["slow_fault_exclusive"] == [0.0, 0.0]
    exit_ns, logged, words, *others = rest[0]["first"], {**rest[0], "sparse": 10_000.0}, *rest[1:]
    assert min(min(values) for values in solve(platform, exit_ns, logged, words, *others, fast=False).values()) == 0.0


def samples(**changed):
    return {item: [float(n) for n in values] for item, values in {"exit": (700, 500, 900), "get_word": (2, 2, 3), **changed}.items()}


def test_a_profile_is_median_and_band_and_the_rest_a_guess(tmp_path):
    made, guess = profile(HOST, samples()), load("guess")
    assert [getattr(costs, "exit") for costs in (made.low, made.costs, made.high)] == [500, 700, 900]  # noqa: B009
    assert not made.origins["exit"].guess
    assert "Linux 6.12.1" in made.origins["exit"].machine
    assert set(made.guesses) == set(ITEMS) - {"exit", "get_word"}
    assert made.costs.walk_2d == guess.costs.walk_2d
    path = tmp_path / "mine.toml"
    path.write_text(dump(made))
    again = load(path)
    assert (again.costs, again.low, again.high, again.origins) == (made.costs, made.low, made.high, made.origins)


def test_a_table_that_is_dropped_takes_the_guess_of_its_leaves_along():
    leaves = 512 * load("guess").costs.zap
    made = profile(HOST, samples(collapse_2m=(leaves + 100, leaves + 300, leaves - 50)))
    assert [costs.collapse_2m for costs in (made.low, made.costs, made.high)] == pytest.approx([0, 100, 300])


def test_on_a_software_backend_every_cost_is_a_guess():
    made = profile(HOST._replace(config="shadow"), samples())
    assert set(made.guesses) == set(ITEMS)
    assert made.origins["exit"].source.endswith("on a software backend")


def test_bad_input_and_a_host_without_kvm(monkeypatch, tmp_path, capsys):
    for argv in (["--repeats", "0"], ["--repeats", "x"], ["-o", str(tmp_path / "none" / "costs.toml")], ["extra"]):
        assert run(["calibrate", *argv]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
    monkeypatch.setattr(device, "PATH", str(tmp_path / "kvm"))
    assert run(["calibrate"]) == 4
    assert "load kvm_intel or kvm_amd" in capsys.readouterr().err


@pytest.mark.long
def test_a_host_is_measured(capsys, tmp_path):
    try:
        kvm = open_kvm()
        host = devkvm.host()
    except NoKvmError as why:
        pytest.skip(str(why))
    repeats = []
    found = measure(host, kvm, 1, repeats.append)
    os.close(kvm)
    assert repeats == [0]
    assert {"exit", "clear_page", "get_word", "bitmap_word", "mask_walk", "ring_push"} <= set(found) <= set(HOW)
    assert found["exit"][0] > 0
    assert run(["calibrate", "--repeats", "1", "-o", str(tmp_path / "costs.toml")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert ("marked as a guess" in err) == host.user_mode
    made = load(tmp_path / "costs.toml")
    assert (set(made.guesses) == set(ITEMS)) == host.user_mode
    assert run(["calibrate", "--repeats", "1"]) == 0
    assert capsys.readouterr().out.startswith("title = ")


@pytest.mark.long
def test_a_kvm_that_refuses_a_step_is_a_missing_piece(monkeypatch, capsys):
    def refuse(*_):
        raise device.IoctlError(12, "ioctl")

    monkeypatch.setattr(calibration, "measure", refuse)
    try:
        os.close(open_kvm())
    except NoKvmError as why:
        pytest.skip(str(why))
    assert run(["calibrate"]) == 4
    assert "the host's KVM refuses a step: ENOMEM: ioctl" in capsys.readouterr().err
