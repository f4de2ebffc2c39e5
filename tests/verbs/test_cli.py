"""The command line: what each verb prints, one line for every error, and the exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import refused, spte

from spte import __version__, policy
from spte._numba import jit as _jit
from spte.cli.app import VERBS, cli
from spte.cli.metrics import COUNTS, MEASURED, RATES, SCHEMA
from spte.cli.verbs import policies as policies_verb
from spte.cli.verbs import profile as profile_verb
from spte.platform import NAMES
from spte.profile.run import DIRECT
from spte.trace import Trace, save
from spte.vm.vm import VM

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(_jit.PLAIN, reason="millions of accesses in plain Python")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "toy.npz"
    gfn = np.r_[0:700, 100:200, 512:1024]
    save(Trace(np.array([0, 10, 20, 30]) * 1_000_000, np.array([0, 700, 800, 1312]), gfn.astype(np.uint32), 1024,
               {"command": "a toy"}), path)  # fmt: skip
    return str(path)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(_jit, "is_warm", lambda: True)


# -- the command ----------------------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_exit_code(capsys):
    for argv in ([], ["--help"], ["-h"]):
        code, out, err = spte(capsys, *argv)
        assert (code, err) == (0, "")
        assert all(re.search(rf"^  {verb} ", out, re.MULTILINE) for verb in VERBS)
        assert "2 bad input" in out


def test_version_is_the_packages(capsys):
    assert spte(capsys, "--version") == (0, f"spte, version {__version__}\n", "")


@pytest.mark.parametrize("verb", ["policies", "profile"])
def test_the_help_of_a_verb_shows_examples(capsys, verb):
    code, out, _ = spte(capsys, verb, "--help")
    assert code == 0
    assert re.search(rf"^    spte {verb}", out, re.MULTILINE)


def test_an_unknown_verb_or_option_is_one_line(capsys):
    assert "frobnicate" in refused(capsys, "frobnicate")
    assert "--frob" in refused(capsys, "profile", "--frob")


def in_process(code, *argv):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, check=False)


def test_help_imports_neither_matplotlib_nor_the_verbs():
    done = in_process(
        "import sys; from spte.cli.app import run; run(['--help']);"
        "sys.exit([m for m in sys.modules if m in ('matplotlib', 'spte.cli.verbs.profile', 'rich')] or 0)"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_cli_extra_one_line_says_how_to_get_it(missing):
    argv = ["spte", "profile"]
    done = in_process(f"import sys; sys.modules[{missing!r}] = None; sys.argv = {argv}; from spte.cli import main; main()")
    assert done.returncode == 4
    assert missing in done.stderr
    assert "kvm-spte[cli]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_ends_with_one_line(capsys, monkeypatch, trace):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(profile_verb, "run_profile", interrupted)
    code, _, err = spte(capsys, "profile", trace)
    assert (code, err.strip()) == (130, "spte: interrupted")


def test_a_host_without_memory_is_one_line(capsys, monkeypatch, trace):
    def hungry(*args, **options):
        raise MemoryError

    monkeypatch.setattr(profile_verb, "run_profile", hungry)
    code, _, err = spte(capsys, "profile", trace)
    assert code == 4
    assert err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "from spte.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


# -- profile --------------------------------------------------------------------------------------------------------------


def test_the_table_is_complete_and_no_wider_than_the_terminal(capsys, monkeypatch, trace):
    for columns in ("40", "80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        code, out, err = spte(capsys, "profile", trace)
        assert (code, err) == (0, "")
        assert out.startswith("a toy\n4 MiB on thp, 3 epochs, 1 vCPU, log bitmap\n")
        assert max(map(len, out.splitlines()[2:])) <= int(columns)
        assert "…" not in out
        header = " ".join(line for line in out.splitlines() if re.match(r"^ {20,}\S", line))
        assert header.split() == list(DIRECT)
        assert out.count("pages written") == {"40": 5, "80": 1, "120": 1}[columns]


def test_json_is_versioned_and_holds_every_figure_under_its_unit(capsys, trace):
    code, out, err = spte(capsys, "profile", trace, "--json", "--platform", "npt", "--policy", "6.1", "--policy", "6.12")
    report = json.loads(out)
    assert (code, err, report["schema"]) == (0, "", SCHEMA)
    assert [(row["platform"], row["policy"]) for row in report["rows"]] == [("npt", "6.1"), ("npt", "6.12")]
    row = report["rows"][1]
    assert row["counts"]["pages_written"] == row["counts"]["faults_fast"] == 1312
    for group, metrics in (("counts", COUNTS), ("rates", RATES), ("measured", MEASURED)):
        assert list(row[group]) == [m.key for m in metrics]
    assert row["rates"]["dirty_rate_mb_per_s"] == pytest.approx(1312 * 4096 / 0.03 / 1e6)
    assert [epoch["pages_reported"] for epoch in row["epochs"]] == [700, 100, 512]
    assert len(row["phases"]) == 3 + 3 * 2  # an epoch: dirty memory, GET


def test_counts_do_not_differ_between_runs_nor_between_json_and_markdown(capsys, trace):
    reports = [json.loads(spte(capsys, "profile", trace, "--json")[1]) for _ in range(2)]
    first, second = ([row["counts"] for row in report["rows"]] for report in reports)
    assert first == second
    cells = markdown_cells(spte(capsys, "profile", trace, "--markdown")[1])
    for metric in COUNTS:
        if metric.always:
            figures = [f"{row[metric.key]:,}" for row in first]
            assert cells[metric.label] == [f if f == figures[0] else f"**{f}**" for f in figures]


def test_a_workload_without_time_has_no_dirty_rate(capsys):
    code, out, _ = spte(capsys, "profile", "--workload", "perf-test", "-b", "2M", "--platform", "npt")
    assert code == 0
    assert re.search(r"dirty rate, pages/s +n/a$", out, re.MULTILINE)


def test_every_letter_of_the_perf_test_reaches_the_workload(capsys):
    letters = ["-v", "2", "-b", "1M", "-s", "shmem", "-o", "-x", "4", "-w", "50", "-a", "-g", "-e", "-i", "3", "--seed", "7"]
    _, out, _ = spte(capsys, "profile", "--workload", "perf-test", *letters, "--platform", "npt", "--json")
    about = json.loads(out)["workload"]
    assert about == {
        "kind": "perf-test", "vcpus": 2, "bytes_per_vcpu": 1 << 20, "source": "shmem", "overlap": True, "memslots": 4,
        "write_percent": 50, "random_access": True, "no_manual_protect": True, "run_while_disabling": True,
        "iterations": 3, "seed": 7, "guest_pages": 512, "backing": "shm", "manual": 0, "ring_bytes": 0,
    }  # fmt: skip


def test_options_of_a_trace_reach_the_workload(capsys, trace):
    argv = [
        "--vcpus",
        "2",
        "--backing",
        "4k",
        "--manual",
        "1",
        "--order",
        "random",
        "--seed",
        "3",
        "--memory",
        "8M",
        "--platform",
        "npt",
        "--json",
    ]
    _, out, _ = spte(capsys, "profile", trace, *argv)
    about = json.loads(out)["workload"]
    got = [about[k] for k in ("vcpus", "backing", "manual", "order", "seed", "guest_pages")]
    assert got == [2, "4k", 1, "random", 3, 2048]
    _, out, _ = spte(capsys, "profile", trace, "--scale", 3, "--ring", "16K", "--platform", "npt", "--json")
    about = json.loads(out)["workload"]
    assert (about["guest_pages"], about["ring_bytes"]) == (3072, 16384)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["no.npz"], "no.npz: can not be read: No such file"),
        ([__file__], "not a whole .npz file"),
        (["--platform", "vmx"], f"'vmx' is not known; take one of {', '.join(NAMES)}"),
        (["--platform", "shadow-rmap"], "'shadow-rmap' is not known"),
        (["--policy", "7"], "'7' is not known; known are series"),
        (["--policy", "6.12,eager=N"], "'eager=N'"),
        (["--policy", "6.12,eager_page_split=maybe"], "eager_page_split='maybe'; take one of"),
        (["--vcpus", "0"], "vcpus=0"),
        (["--vcpus", "many"], "'many'"),
        (["--backing", "8k"], "'8k'"),
        (["--manual", "2"], "'2'"),
        (["--log", "wp"], "'wp' is no way to log; take bitmap, manual, initially-set or ring=SIZE"),
        (["--log", "ring"], "'ring' is no way to log"),
        (["--log", "ring=64K,bitmap"], "'ring=64K,bitmap' is no way to log"),
        (["--log", "ring=5000"], "5000"),
        (["--log", "ring=x"], "'x' is no size"),
        (["--log", "manual", "--ring", "64K"], "--ring and --log both say how to log"),
        (["--log", "manual", "--manual", "1"], "--manual and --log both say how to log"),
        (["--workload", "perf-test", "-g", "--log", "manual"], "-g and --log both say how to log"),
        (["--workload", "perf-test", "--backing", "thp"], "--backing is for traces"),
        (["--log-from", "boot"], "'boot'"),
        (["--eager", "maybe"], "'maybe'"),
        (["--policy", "6.12,eager_page_split=N", "--eager", "Y"], "both set eager_page_split"),
        (["--clear-chunk", "100"], "clear_chunk=100 is not a positive multiple of 64"),
        (["--clear-chunk", "0"], "clear_chunk=0"),
        (["--csv"], "--csv needs --epochs"),
        (["--pivot", "--json"], "--pivot turns the table"),
        (["--cost", "mine"], "there is no cost profile 'mine'; take one of guess"),
        (["--cost", __file__], "this is no TOML"),
        (["--cost-range"], "--cost-range needs --cost; take one of guess"),
        (["--recommend"], "--recommend needs --cost"),
        (["--recommend", "--epochs", "--cost", "guess"], "--recommend stands below the table"),
        (["--order", "down"], "'down'"),
        (["--ring", "5000"], "5000"),
        (["--ring", "2M"], "2097152"),
        (["--ring", "0"], "'0'"),
        (["--scale", "0"], "--scale 0"),
        (["--scale", "2", "--memory", "1G"], "take one"),
        (["--scale", "99999999999999999999"], "memory of"),
        (["--memory", "1.5G"], "'1.5G'"),
        (["--memory", "1M"], "1048576"),
        (["--memory", "4097"], "--memory 4097"),
        (["--memory", "5000P"], "memory of"),
        (["--seed", "-1"], "seed=-1"),
        (["--workload", "other"], "'other'"),
        (["-b", "1G"], "-b needs --workload perf-test"),
        (["-o"], "-o needs --workload perf-test"),
        (["--workload", "perf-test", "--scale", "2"], "--scale is for traces"),
        (["--workload", "perf-test", "x.npz"], "TRACE is for traces"),
        (["--workload", "perf-test", "--ring", "64K"], "--ring is for traces"),
        (["--workload", "perf-test", "-b", "5"], "bytes_per_vcpu=5"),
        (["--workload", "perf-test", "-w", "101"], "write_percent=101"),
        (["--workload", "perf-test", "-x", "7"], "memslots=7"),
        (["--workload", "perf-test", "-i", "0"], "iterations=0"),
        (["--workload", "perf-test", "-s", "tape"], "'tape'"),
        (["--plot", "a.bmp"], "'a.bmp' does not end in .png"),
        (["--plot", "/no/such/dir/a.png"], "'/no/such/dir'"),
        (["--output", "/"], "'/' is a directory"),
    ],
)
def test_bad_input_is_refused_in_one_line_with_its_value_before_any_work(capsys, monkeypatch, argv, said):
    monkeypatch.setattr(VM, "get_dirty_log", None)
    assert said in refused(capsys, "profile", *argv)


def test_a_guest_that_this_host_can_not_hold_is_refused_with_the_largest_it_can(capsys, monkeypatch, trace):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 18, "SC_PAGE_SIZE": 4096}[name])
    err = refused(capsys, "profile", trace, "--memory", "1T")
    assert "1 TiB" in err
    assert "1 GiB" in err


def test_a_lost_page_ends_with_exit_code_1_and_names_it(capsys, monkeypatch, trace):
    honest, forgotten = VM.get_dirty_log, np.zeros(16, np.uint64)
    forgotten[0] = 1 << 5
    monkeypatch.setattr(VM, "get_dirty_log", lambda self, slot: honest(self, slot) & ~forgotten)
    code, out, err = spte(capsys, "profile", trace, "--platform", "npt")
    assert code == 1
    assert re.search(r"^pages lost +1$", out, re.MULTILINE)
    assert err == "spte profile: npt: 1 pages were written and not reported, first gfn 5 in epoch 0\n"


def test_a_ring_with_initially_set_loses_what_kvm_loses_and_says_why(capsys, trace):
    """kvm_mmu_slot_apply_flags returns early for initially-set, and only CLEAR would make up for it."""
    options = ["--ring", "16K", "--manual", "3", "--platform", "npt", "--platform", "ept-pml"]
    code, out, err = spte(capsys, "profile", trace, *options)
    assert code == 1
    assert re.search(r"^pages reported +0 +0$", out, re.MULTILINE)
    assert [line.split(": ")[1] for line in err.splitlines()] == ["npt", "ept-pml"]
    for line, name in zip(out.splitlines()[-2:], ("npt", "ept-pml"), strict=True):
        assert line.startswith(f"{name}: with initially-set, enabling arms no page, in KVM too")
        assert line.endswith("; take ring alone")
    code, _, err = spte(capsys, "profile", trace, "--ring", "16K", "--manual", "1", "--platform", "npt")
    assert (code, err) == (0, "")


def test_initially_set_pages_have_a_row_of_their_own(capsys, trace):
    for manual, shown in (("1", False), ("3", True)):
        cells = markdown_cells(spte(capsys, "profile", trace, "--markdown", "--platform", "npt", "--manual", manual)[1])
        assert cells["pages over-reported"] == ["0"]
        assert ("pages initially set, not written" in cells) == shown
    written, reported = (int(cells[label][0].replace(",", "")) for label in ("pages written", "pages reported"))
    assert cells["pages initially set, not written"] == [f"{reported - written:,}"]


@pytest.mark.parametrize(("options", "harvest"), [
    ([], ["get dirty log"]), (["--manual", "1"], ["get dirty log", "clear dirty log"]),
    (["--ring", "64K"], ["collect dirty rings", "reset dirty rings"]),
    (["--ring", "64K", "--manual", "1"], ["collect dirty rings", "reset dirty rings"]),
])  # fmt: skip
def test_a_report_names_what_was_done_and_nothing_else(capsys, trace, options, harvest):
    _, out, _ = spte(capsys, "profile", trace, "--json", "--platform", "npt", *options)
    names = [phase["name"] for phase in json.loads(out)["rows"][0]["phases"]]
    assert names[2:-1] == [f"Iteration {i} {what} time" for i in (1, 2, 3) for what in ("dirty memory", *harvest)]
    _, out, _ = spte(capsys, "profile", trace, "--platform", "npt", *options)
    assert not re.search(r"\b(GET|CLEAR)\b", out)


def test_the_plot_is_a_picture_and_the_output_a_file(capsys, tmp_path, trace):
    png, txt = tmp_path / "cost.png", tmp_path / "out.json"
    code, out, err = spte(capsys, "profile", trace, "--plot", png, "--output", txt, "--json", "--platform", "npt")
    assert (code, out, err) == (0, "", "")
    assert png.read_bytes().startswith(PNG)
    assert json.loads(txt.read_text())["schema"] == SCHEMA


def test_a_plot_without_matplotlib_is_exit_code_4_before_any_work(capsys, monkeypatch, tmp_path, trace):
    monkeypatch.setattr(profile_verb, "run_profile", None)
    monkeypatch.delitem(sys.modules, "spte.cli.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = spte(capsys, "profile", trace, "--plot", tmp_path / "a.png")
    assert code == 4
    assert err == "spte: this needs matplotlib; pip install 'kvm-spte[cli]'\n"


def test_the_first_run_says_what_it_waits_for(capsys, monkeypatch, trace):
    monkeypatch.setattr(_jit, "is_warm", lambda: False)
    _, _, err = spte(capsys, "profile", trace, "--platform", "npt")
    assert "compiling" in err
    assert err.count("\n") == 1


def test_no_progress_is_drawn_where_stderr_is_no_terminal(capsys, trace):
    assert spte(capsys, "profile", trace, "--platform", "npt")[2] == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin1"])
def test_a_terminal_without_utf8_gets_no_traceback(encoding):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    code = "from spte.cli import main; import sys; sys.argv = ['spte', 'policies']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- policies -------------------------------------------------------------------------------------------------------------


def test_policies_lists_every_decision_with_its_values_and_source(capsys):
    code, out, err = spte(capsys, "policies", "--json")
    listed = json.loads(out)
    assert (code, err) == (0, "")
    assert listed["policies"] == list(policy.NAMES)
    for entry, (field, _, meaning, _) in zip(listed["decisions"], policy.Policy.named("6.12").describe(), strict=True):
        assert (entry["decision"], entry["meaning"]) == (field, meaning)
        told = [{"version": c.version, "value": policy.spell(c.value), "source": c.source} for c in policy.changes(field)]
        assert entry["changes"] == told
        for name, value in entry["values"].items():
            assert policy.parse(f"{name},{field}={value}").describe() == policy.Policy.named(name).describe()


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_of_policies_holds_every_value_unbroken_and_at_100_columns_each_decision_on_one_line(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = spte(capsys, "policies")
    assert (code, err) == (0, "")
    lines = out.partition("\n\n")[0].splitlines()[1:]
    assert max(map(len, out.splitlines())) <= columns
    words = " ".join(lines).split()
    ref = []
    for field in policy.decisions():
        first, *later = policy.changes(field.name)
        ref += [field.name, policy.spell(first.value), *(word for c in later for word in (f"{c.version}:", policy.spell(c.value)))]
    assert words == ref
    if columns == 100:
        assert len(lines) == len(policy.decisions())


def test_a_row_too_long_for_the_terminal_goes_on_below_at_a_whole_value():
    rows = {"short": [("5.10", "N")], "long": [("5.10", "zap-leaf"), *((f"5.{n}", "zap-table") for n in (11, 12, 13))]}
    assert policies_verb.table(rows, 40) == [
        "decision  5.10      since",
        "short     N",
        "long      zap-leaf  5.11: zap-table",
        "                    5.12: zap-table",
        "                    5.13: zap-table",
    ]


def test_a_version_tells_since_when_each_decision_holds_and_what_it_rests_on(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = spte(capsys, "policies", "6.8")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(" "))
    assert list(rows) == ["decision", *(f.name for f in policy.decisions())]
    assert rows["fault_split"].split() == ["in-place", "6.3", "c4b33d28ea7b;", "recordings", "6.12"]
    assert rows["binary_stats"].split() == ["Y", "5.14", "recordings", "6.1", "and", "6.12"]
    listed = json.loads(spte(capsys, "policies", "6.8.12", "--json")[1])["decisions"]
    assert listed == json.loads(json.dumps([row._asdict() for row in policy.evidence("6.8")]))
    assert "the nearest is 7.2" in refused(capsys, "policies", "9.1")


def test_a_field_is_told_with_its_meaning_choices_values_and_source(capsys):
    code, out, err = spte(capsys, "policies", "--field", "collapse", "--field", "prefault")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    told = {field: meaning for field, _, meaning, _ in policy.Policy.named("6.12").describe()}
    folded = " ".join(out.split())
    for field in ("collapse", "prefault"):
        assert f"{field}: {told[field]} 5.10 " in folded
        assert all(f"{c.version} {policy.spell(c.value)} ({c.source})" in folded for c in policy.changes(field))
    assert "choices zap-leaf, zap-table, recover" in folded
    assert re.search(r"^  6.13 +recover ", out, re.MULTILINE)
    assert [e["decision"] for e in json.loads(spte(capsys, "policies", "--field", "prefault", "--json")[1])["decisions"]] == ["prefault"]
    assert "eager_page_split" in refused(capsys, "policies", "--field", "eager")


# -- README ---------------------------------------------------------------------------------------------------------------


def markdown_cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {label: values for label, *values in rows}


@compiled
def test_the_counts_in_the_readme_are_what_its_command_prints(capsys):
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- spte profile --markdown -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    ref = markdown_cells(spte(capsys, "profile", "--markdown")[1])
    got = markdown_cells(shown[1])
    assert list(got) == list(ref)
    exact = [label for label in ref if "measured" not in label]
    assert len(exact) > 20
    assert {label: got[label] for label in exact} == {label: ref[label] for label in exact}


@pytest.mark.long
def test_the_matrix_in_the_readme_is_what_its_command_prints(capsys):
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- spte check --markdown tests/golden -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    code, out, _ = spte(capsys, "check", "--markdown", str(ROOT / "tests" / "golden"))
    assert code == 1  # the walk that yielded
    assert markdown_cells(shown[1]) == markdown_cells(out)


def test_the_import_example_of_the_readme_runs_and_has_at_most_12_lines():
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example.count("\n") <= 12
    exec(compile(example, "README.md", "exec"), {})


def test_verbs_are_the_modules_of_the_command_line():
    for verb in VERBS:
        assert cli.get_command(None, verb).name == verb


# -- profile --limits -----------------------------------------------------------------------------------------------------


def test_limits_print_every_ratio_in_each_style(capsys, monkeypatch):
    from spte.cli import limits
    from spte.limits.measure import Ratio

    ratios = [Ratio("writes", "write", 3.0, "a[gfn] |= D", 2.0, 1.25), Ratio("threads", "SPTE", 1.0, "one thread", 2.0, None)]
    monkeypatch.setattr(limits, "measure_all", lambda pages, progress: iter(ratios))
    _, out, _ = spte(capsys, "profile", "--limits", "--memory", "64M")
    assert re.search(r"writes +3 +write +a\[gfn\] \|= D +2 +1\.5x +1\.25x +missed", out)
    _, out, _ = spte(capsys, "profile", "--limits", "--markdown")
    assert "| threads | 1 | SPTE | one thread | 2 | 0.5x |  |  |" in out
    _, out, _ = spte(capsys, "profile", "--limits", "--json")
    report = json.loads(out)
    assert [(r["ratio"], r["met"]) for r in report["ratios"]] == [(1.5, False), (0.5, None)]


@pytest.mark.parametrize("argv", [("--vcpus", 2), ("--memory", "5M"), ("--memory", "62M"), ("--memory", "900T"), ("--platform", "npt")])
def test_limits_refuse_what_they_can_not_use(capsys, argv):
    assert str(argv[0]) in refused(capsys, "profile", "--limits", *argv)


@pytest.mark.long
def test_limits_measure_each_kernel(capsys):
    code, out, _ = spte(capsys, "profile", "--limits", "--memory", "64M", "--json")
    assert code == 0
    ratios = json.loads(out)["ratios"]
    assert ratios
    assert all(r["ns"] > 0 < r["limit_ns"] for r in ratios)
