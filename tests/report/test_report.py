"""Reports: whole in one file, drawn and clicked in Chromium, told apart without colour, refused where plotly is missing."""

import html
import io
import re

import matplotlib.image
import pytest
from browser import Browser
from commandline import save_toy

from spte._numba import jit as _jit
from spte.cli.app import run

go = pytest.importorskip("plotly.graph_objects", reason="needs plotly: pip install 'kvm-spte[report]'")
from spte.cli.html import page  # noqa: E402 - it needs plotly

compiled = pytest.mark.skipif(_jit.PLAIN, reason="hundreds of thousands of accesses in plain Python")


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.npz", "a toy <b>& more</b>")


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


RUNS = {
    "migrate": (["--bandwidth", "3MB/s", "--downtime", "21ms", "--cost", "guess", "--max-time", "8s"], 4),
    "grid": (["--grid", "bandwidth=1MB/s,1Gbit", "--grid", "downtime=25ms,1s", "--max-time", "3s", "--cost", "guess"], 3),
    "sweep": (["--vary", "log=bitmap,ring", "--vary", "vcpus=1,2", "--vary", "bandwidth=1Gbit,2Gbit", "--workers", "1"], 1),
    "profile": (["--cost", "guess", "--platform", "npt", "--platform", "ept-pml"], 5),
}


def report(capsys, toy, tmp_path, verb):
    path = tmp_path / "report.html"
    assert run([{"grid": "migrate"}.get(verb, verb), toy, *RUNS[verb][0], "--report", str(path)]) == 0
    capsys.readouterr()
    return path


@pytest.mark.long
@pytest.mark.parametrize("verb", RUNS)
def test_a_page_is_drawn_sorts_and_asks_for_nothing(capsys, toy, tmp_path, browser, verb):
    path = report(capsys, toy, tmp_path, verb)
    browser.open(path)
    figures = RUNS[verb][1]
    assert browser.evaluate("document.querySelectorAll('.js-plotly-plot .main-svg .cartesianlayer').length") == figures
    assert browser.evaluate("document.querySelectorAll('.js-plotly-plot').length") == figures
    column = "[...table.tBodies[0].rows].map(row => row.cells[at].dataset.v)"
    table = "const table = [...document.querySelectorAll('table')].at(-1); const at = table.tHead.rows[0].cells.length - 1;"
    before = browser.evaluate(f"{{ {table} {column} }}")
    for order in ("ascending", "descending"):
        browser.click("[...document.querySelectorAll('table')].at(-1).tHead.rows[0].lastElementChild.firstElementChild")
        assert browser.evaluate(f"{{ {table} table.tHead.rows[0].cells[at].getAttribute('aria-sort') }}") == order
        numbers = [float(value) for value in browser.evaluate(f"{{ {table} {column} }}") if value]
        assert numbers == sorted(numbers, reverse=order == "descending")
    assert sorted(browser.evaluate(f"{{ {table} {column} }}")) == sorted(before)
    asked = [event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")] == []
    assert "<b>" not in browser.evaluate("document.querySelector('h1').innerHTML")
    shot = matplotlib.image.imread(io.BytesIO(browser.picture()))[..., :3]
    assert 0.005 < (shot.min(axis=2) < 0.6).mean() < 0.5  # something is drawn on white


def test_a_click_in_the_legend_switches_a_line_off(capsys, toy, tmp_path, browser):
    browser.open(report(capsys, toy, tmp_path, "migrate"))
    shown = "document.querySelector('.js-plotly-plot').data.map(line => line.visible ?? true)"
    assert browser.evaluate(shown) == [True, True, True]
    browser.click("document.querySelector('.js-plotly-plot .legendtoggle')")
    browser.evaluate("new Promise(resolve => setTimeout(resolve, 800))")  # plotly waits for a second click
    assert browser.evaluate(shown) == ["legendonly", True, True]


@pytest.mark.parametrize("verb", RUNS)
def test_a_page_is_whole_and_fetches_nothing(capsys, toy, tmp_path, verb):
    text = report(capsys, toy, tmp_path, verb).read_text()
    outside_of_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=", outside_of_scripts)
    assert "default-src 'none'" in text
    assert "&lt;b&gt;&amp; more" in outside_of_scripts or verb == "sweep"


@compiled
@compiled
def test_what_the_terminal_tells_the_page_tells(capsys, toy, tmp_path):
    """The verdict; a dirty limit in place of a share of time; no stall where no costs were given."""
    path = tmp_path / "report.html"
    argv = ["profile", toy, "--platform", "npt", "--platform", "ept-pml", "--cost", "guess", "--recommend", "--report", str(path)]
    assert run(argv) == 0
    verdict = capsys.readouterr().out.partition("recommended (estimated)")[2].splitlines()[0]
    assert f"recommended (estimated){verdict}" in html.unescape(path.read_text())
    argv = ["migrate", toy, "--log", "ring", "--grid", "throttle=none,dirty-limit", "--bandwidth", "1MB/s", "--downtime", "21ms"]
    for cost in ([], ["--cost", "guess"]):
        assert run([*argv, "--max-time", "9s", *cost, "--report", str(path)]) == 0
        throttled = re.search(r"dirty-limit .*?([\d.]+ MB/s)$", capsys.readouterr().out, re.MULTILINE)
        table = path.read_text().rpartition("<table")[2]
        assert f">{throttled[1]}<" in table
        assert ("guest stall" in table) == bool(cost)


def test_the_patches_and_papers_have_pages_too(capsys, tmp_path):
    path = tmp_path / "patches.html"
    assert run(["patches", "--patch", "5", "--report", str(path)]) == 0
    assert run(["papers", "--help"]) == 0
    assert "--report" in capsys.readouterr().out
    assert "Patch 5: " in path.read_text()
    assert "as specified" in path.read_text()


def test_series_differ_without_colour():
    shown = page.figure("x", "y")
    for number in range(len(page.COLOURS)):
        page.bars(shown, number, str(number), [1], [2])
        page.steps(shown, number, str(number), [0, 1], [2])
        page.points(shown, number, str(number), [1], [2])
    told = [
        ("bar", one.marker.pattern.shape) if one.type == "bar" else (one.mode, one.marker.symbol, one.line.dash) for one in shown.data
    ]
    assert len(set(told)) == len(told) == 3 * len(page.COLOURS)


def test_without_plotly_it_is_said_before_the_work(capsys, toy, tmp_path, monkeypatch, uninstall):
    uninstall("plotly", "spte.cli.html")
    monkeypatch.setattr("spte.cli.verbs.migrate.run_migrate", None)
    assert run(["migrate", toy, "--report", str(tmp_path / "r.html")]) == 4
    assert capsys.readouterr().err == "spte: this needs plotly; pip install 'kvm-spte[report]'\n"
    assert run(["migrate", toy, "--report", str(tmp_path / "r.pdf")]) == 2
