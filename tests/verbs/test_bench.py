"""The benchmark report says what the figures say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report, threads
from spte._numba import jit as _jit
from spte.limits.measure import Case, measure, ratio_of


def case(units: int, limit_units: int = 0, at_most: float | None = 2.0) -> Case:
    return Case("a kernel", "SPTE", units, lambda: None, "a loop", lambda: None, at_most, limit_units=limit_units)


def test_a_ratio_is_time_a_unit_over_time_a_unit():
    ratio = ratio_of(case(units=10, limit_units=5), kernel_s=3e-6, limit_s=1e-6)
    assert (ratio.ns, ratio.limit_ns, ratio.ratio) == pytest.approx((300.0, 200.0, 1.5))
    assert ratio.met
    assert ratio_of(case(10), 3e-6, 1e-6).met is False
    assert ratio_of(case(10, at_most=None), 3e-6, 1e-6).met is None


def test_each_measured_round_refills_first():
    calls: list[str] = []
    order = Case(
        "k", "u", 1, lambda: calls.append("work"), "l", lambda: calls.append("limit"), None,
        lambda: calls.append("setup"), lambda: calls.append("limit setup"),
    )  # fmt: skip
    measure(order, rounds=2)
    assert calls == ["setup", "work", "limit setup", "limit"] * 3


INFO = {
    "name": "harvest", "unit": "page", "units": 8, "ns_per_unit": 1.25, "limit": "a loop", "limit_ns_per_unit": 1.0, "ratio": 1.25,
    "at_most": 1.0, "met": False, "why": "two lines", "guest": 4 << 30,
}  # fmt: skip


def test_the_report_prints_every_figure_and_whether_it_is_met(tmp_path, capsys):
    large = INFO | {"guest": 1 << 40, "ns_per_unit": 0.9, "ratio": 0.9, "met": True}
    start = {"name": "import", "unit": "process", "units": 1, "ns_per_unit": 5e7}
    slow = start | {"name": "compilation", "limit": "25 s", "met": False, "why": "much code"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": info} for info in (INFO, large, start, slow, {})]}))
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| work | per | limit | at most | 4 GiB | 1 TiB |",
        "| :-- | --: | :-- | --: | --: | --: |",
        "| harvest | page | a loop | 1x | 1.25 ns, 1.25x missed | 0.9 ns, 0.90x |",
        "",
        "Missed, and why:",
        "",
        "- harvest, 4 GiB: two lines.",
        "",
        "| a call, a fresh process | time | at most |  |",
        "| :-- | --: | --: | --: |",
        "| import | 50 ms |  |  |",
        "| compilation | 50 ms | 25 s | missed: much code |",
    ]
    path.write_text(json.dumps({"benchmarks": [{"extra_info": INFO | {"name": report.TEN[0]}}]}))
    chart = tmp_path / "chart.png"
    assert report.main([str(path), str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ns", "text"), [(64.6e9, "64.6 s"), (6.2e7, "62 ms"), (5150, "5.15 us"), (31, "31 ns")])
def test_a_time_has_the_unit_that_it_is_read_in(ns, text):
    assert report.time_of(ns) == text


def test_the_report_replaces_the_table_between_the_marks_of_a_page(tmp_path, capsys):
    path, page = tmp_path / "run.json", tmp_path / "page.md"
    infos = [INFO | {"name": name} for name in ("another", report.TEN[1], report.TEN[0])]
    path.write_text(json.dumps({"benchmarks": [{"extra_info": info} for info in infos]}))
    for mark in (report.FULL, report.EXCERPT):
        page.write_text(f"before\n{mark}\nold\n{report.END}\nafter\n")
        for _ in range(2):
            assert report.main([str(path), str(page)]) == 0
            printed = capsys.readouterr().out.splitlines()
            shown = printed if mark == report.FULL else [*printed[:2], printed[4], printed[3]]
            assert page.read_text().splitlines() == ["before", mark, *shown, report.END, "after"]
    page.write_text("no marks")
    assert report.main([str(path), str(page)]) == 2
    assert page.read_text() == "no marks"


def rows_between(page: str, mark: str) -> list[str]:
    text = (Path(report.__file__).parents[1] / page).read_text()
    assert 0 < text.find(mark) < text.find(report.END)
    return text.partition(mark)[2].partition(report.END)[0].strip().splitlines()


def test_the_rows_of_the_readme_are_those_of_the_full_table():
    full = rows_between("docs/benchmarks.md", report.FULL)
    shown = rows_between("README.md", report.EXCERPT)
    assert [line.split(" | ")[0] for line in shown[2:]] == [f"| {name}" for name in report.TEN]
    assert set(shown) <= set(full)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"benchmarks": [{"extra_info": {"name": 1}}]}'])
def test_what_is_no_benchmark_run_gets_one_line_and_exit_2(tmp_path, capsys, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    assert report.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert report.main([]) == 2
    assert report.main([str(path), "chart.txt"]) == 2


@pytest.mark.long
@pytest.mark.skipif(_jit.PLAIN, reason="takes minutes in plain Python")
def test_every_benchmark_runs_once_as_a_test():
    """On the smallest guest: collection, fixtures, refills and the C baselines, where a compiler is found."""
    pytest.importorskip("pytest_benchmark")
    root = Path(__file__).parents[2]
    argv = ["bench", "-q", "--guest", "2M", "--benchmark-disable", "-p", "no:cacheprovider", "--ignore", "bench/bench_cold_start.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *argv], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_operation_has_its_benchmark():
    files = {path.stem for path in (Path(report.__file__).parent).glob("bench_*.py")}
    operations = {"write_protect", "clear_dirty", "harvest", "pml", "split", "collapse", "fault", "guest_access", "rmap", "cold_start"}
    assert {f"bench_{name}" for name in operations} <= files


def test_the_table_of_threads_tells_marks_and_goes_into_a_page(tmp_path, monkeypatch, capsys):
    rows = [
        threads.Row("two over one", 1.5, "x", 1.7), threads.Row("over the limit", 1.5, "x", 2.0, False), threads.Row("rate", 61.234, "M/s"),
    ]  # fmt: skip
    monkeypatch.setattr(threads, "rows", lambda pages: rows)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{threads.MARK}\nold\n{threads.END}\nafter\n")
    assert threads.main(["--guest", "2M", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| two over one | 1.50 x | at least 1.70 x | missed |",
        "| over the limit | 1.50 x | at most 2.00 x | met |",
        "| rate | 61.2 M/s |  |  |",
    ]
    assert page.read_text().splitlines() == ["before", threads.MARK, *lines, threads.END, "after"]
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        threads.main(["--guest", "2M", str(page)])
    assert threads.MARK in capsys.readouterr().err


@pytest.mark.long
def test_what_two_threads_do_is_measured(monkeypatch):
    for name in ("ROUNDS", "MANY", "WRITES", "SHORT"):
        monkeypatch.setattr(threads, name, 1 if name in ("ROUNDS", "MANY") else 64)
    real = threads.under_harvest
    monkeypatch.setattr(threads, "under_harvest", lambda guest, pool: real(guest, pool, 0.01))
    measured = threads.rows(512)
    *others, wait = [row.figure for row in measured]
    assert len(others) == 9
    assert min(others) > 0
    assert wait >= 0  # of so few harvests it may be that none met a vCPU in the guest


def test_the_readme_names_the_throughput_that_the_page_on_threads_measured():
    root = Path(report.__file__).parents[1]
    (figure,) = re.findall(r"while a third harvests all the time \| (\d+) M writes/s", (root / "docs" / "threads.md").read_text())
    assert f"vCPU threads write {figure} million pages a second" in " ".join((root / "README.md").read_text().split())
