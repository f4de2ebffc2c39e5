"""`spte convert`, `spte show` and `spte generate` on the command line, the page of docs about them, and the sizes they bear."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import refused, spte

from bench.bench_convert import LINES, million_lines
from spte.cli.params import address, duration, rate, spell_time
from spte.convert import FORMATS
from spte.trace import Trace, default_trace, load, save

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "convert" / "data"
PNG = b"\x89PNG\r\n\x1a\n"
SLOTS = ("--slot", "0:512K", "--slot", "1=0xC0000:256K")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.npz"


def test_convert_writes_a_trace_and_says_what_it_is(capsys, out):
    code, text, err = spte(capsys, "convert", *sorted(DATA.glob("dirty-*.bin")), *SLOTS, "-o", out, "--interval", "1s")
    assert (code, err) == (0, "")
    assert text == f"{out}: 4 epochs of 1 s, 2 MiB of memory, 12 page writes, from dirty bitmaps of KVM_GET_DIRTY_LOG\n"
    assert load(out).command == "dirty-0.bin and 3 more"
    assert load(out).duration_ns == 4 * 10**9


def test_convert_reads_stdin(out):
    command = [sys.executable, "-c", "from spte.cli import main; main()", "convert", "-", *SLOTS, "-o", str(out)]
    with (DATA / "perf.txt").open("rb") as text:
        done = subprocess.run(command, stdin=text, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert load(out).writes == 12


def test_convert_tells_what_it_left_out(capsys, tmp_path, out):
    (tmp_path / "t").write_text("0 1\n0 0xfee00\n")
    code, text, err = spte(capsys, "convert", tmp_path / "t", "--slot", "0:2M", "-o", out)
    assert (code, err) == (0, "spte convert: 1 writes lie in no slot (MMIO, or a slot that was not given) and are left out\n")
    assert "1 page writes" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["t"], "--output"),
        (["-o", "OUT"], "IN..."),
        (["no", "-o", "OUT"], "no: can not be read"),
        (["t", "-o", "out.txt"], ".npz"),
        (["t", "-o", "OUT", "--interval", "0s"], "'0s' is no time above 0"),
        (["t", "-o", "OUT", "--interval", "fast"], "like 100ms"),
        (["t", "-o", "OUT", "--slot", "3G"], "like 0:3G or 1=4G:5G"),
        (["t", "-o", "OUT", "--slot", "0:3K"], "multiples of 4096"),
        (["t", "-o", "OUT", "--slot", "x:3G"], "'x' is no size"),
        (["t", "-o", "OUT", "--pages", "0"], "0 pages"),
        (["t", "-o", "OUT", "--format", "lackey"], "line 1: '0 1' is no line of lackey"),
        (["-", "-", "-o", "OUT"], "twice"),
        (["t.npz", "-o", "t.npz"], "both input and output"),
    ],
)
def test_convert_refuses_in_one_line(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("0 1\n")
    (tmp_path / "t.npz").write_text("0 1\n")
    assert said in refused(capsys, "convert", *(str(tmp_path / "o.npz") if arg == "OUT" else arg for arg in argv))
    assert not (tmp_path / "o.npz").exists()


def test_the_help_names_every_format(capsys):
    _, text, _ = spte(capsys, "convert", "--help")
    assert all(re.search(rf"^ +{name} +\S", text, re.MULTILINE) for name in FORMATS)


def test_show_prints_the_figures(capsys):
    code, text, err = spte(capsys, "show")
    assert (code, err) == (0, "")
    trace = default_trace()
    assert f"{trace.writes:,}" in text
    assert "89,088 pages" in text
    rows = re.findall(r"^ +(\S+ \S+) +([\d,]+) +([\d.]+)% +([\d.,]+)$", text, re.MULTILINE)
    assert rows[0][1] == f"{trace.writes / trace.nepochs:,.0f}"
    assert rows[-1][1] == f"{len(np.unique(trace.gfn)):,}"


def test_show_as_json(capsys):
    code, text, _ = spte(capsys, "show", "--json")
    got = json.loads(text)
    assert (code, got["schema"], got["writes"], got["epochs"]) == (0, "spte-show/1", default_trace().writes, 54)


@pytest.mark.parametrize(
    "trace",
    [
        default_trace(),
        Trace(np.array([0, 0]), np.array([0, 0]), np.array([], np.uint32), 512),
        Trace(np.array([0, 0, 0]), np.array([0, 1, 1]), np.array([511], np.uint64), 512),
        Trace(np.array([0, 5, 5, 10**13]), np.array([0, 1, 2, 3]), np.array([0, 0, 1 << 30], np.uint32), 1 << 30 | 512,
              {"command": "x" * 300 + "\n$\\"}),
    ],
    ids=["shipped", "no write, no time", "no time", "large"],
)  # fmt: skip
def test_show_draws_any_trace(capsys, tmp_path, trace):
    save(trace, tmp_path / "t.npz")
    code, text, err = spte(capsys, "show", tmp_path / "t.npz", "--png", tmp_path / "t.png")
    assert (code, err) == (0, "")
    assert text.isascii()
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)


def test_show_refuses_what_is_no_trace(capsys, tmp_path):
    (tmp_path / "t").write_text("0 1\n")
    assert "not a whole .npz file" in refused(capsys, "show", tmp_path / "t")
    assert "does not end in" in refused(capsys, "show", "--png", tmp_path / "t.txt")


def test_generate_writes_a_trace(capsys, out):
    argv = ("zipf", "--memory", "16M", "--rate", "50MB/s", "--theta", "1.2", "--duration", "1s", "-o", out)
    code, text, err = spte(capsys, "generate", *argv)
    assert (code, err) == (0, "")
    assert text == f"{out}: 10 epochs of 100 ms, 16 MiB of memory, {load(out).writes:,} page writes\n"
    assert load(out).command == "zipf theta=1.2 memory=16777216 rate=50000000 seed=0"
    assert spte(capsys, "generate", "perf-test", "--memory", "4M", "--random-access", "-o", out)[0] == 0
    assert load(out).nepochs == 2


def test_generate_explains_itself(capsys):
    for argv in (["generate"], ["generate", "--help"]):
        code, text, err = spte(capsys, *argv)
        assert (code, err) == (0, "")
        assert re.search(r"^  hot-cold ", text, re.MULTILINE)
    assert "[default: 0.99]" in spte(capsys, "generate", "zipf", "--help")[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["frob"], "frob"),
        (["zipf"], "--output"),
        (["zipf", "--theta", "0", "-o", "OUT"], "theta=0"),
        (["zipf", "--rate", "5", "-o", "OUT"], "like 500MB/s"),
        (["zipf", "--memory", "5", "-o", "OUT"], "memory=5"),
        (["perf-test", "--iterations", "0", "-o", "OUT"], "iterations=0"),
    ],
)
def test_generate_refuses_in_one_line(capsys, out, argv, said):
    assert said in refused(capsys, "generate", *(out if arg == "OUT" else arg for arg in argv))


def test_spellings():
    assert [duration(t) for t in ("100ms", "1.5s", "3us", "7ns")] == [10**8, 15 * 10**8, 3000, 7]
    assert [rate(t) for t in ("500MB/s", "1.5GB/s", "1MiB/s", "9B/s", "2kb/s")] == [5 * 10**8, 15 * 10**8, 1 << 20, 9, 2000]
    assert [address(t) for t in ("0", "0xC0000", "4G")] == [0, 0xC0000, 4 << 30]
    assert [spell_time(s) for s in (2.5, 0.05, 1e-5, 3e-9)] == ["2.5 s", "50 ms", "10 us", "3 ns"]


def blocks_of(page):
    return re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_the_commands_of_the_docs_run(tmp_path):
    for path in DATA.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    script = "".join(blocks_of((ROOT / "docs" / "convert.md").read_text()))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    vm, same, stack, ring, traced = (load(tmp_path / f"{name}.npz") for name in ("vm", "same", "stack", "ring", "traced"))
    assert all((other.gfn == vm.gfn).all() for other in (same, ring, traced))
    assert stack.writes == vm.writes
    assert (tmp_path / "zipf.png").read_bytes().startswith(PNG)


@pytest.mark.long
@pytest.mark.parametrize("kind", LINES)
def test_each_page_of_a_million_lines_is_in_the_trace(capsys, tmp_path, out, kind):
    """Their time: bench/bench_convert.py."""
    pages, options = million_lines(tmp_path / "t", kind)
    assert spte(capsys, "convert", tmp_path / "t", *options, "-o", out)[0] == 0
    assert set(load(out).gfn.tolist()) == set(pages) or kind == "lackey"


# The peak of this program alone: what wait4 tells begins with that of the process which started it.
CONVERT_AND_TELL_PEAK = """
import atexit, re
from pathlib import Path
atexit.register(lambda: print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
from spte.cli import main
main()
"""


@pytest.mark.long
def test_a_large_text_needs_memory_for_its_pages_only(tmp_path, out):
    """256 MiB, 2^18 pages in each epoch of a million lines: 400 MiB at most, of which the packages take 150."""
    page = np.random.default_rng(0).permutation(1 << 18)
    second = "".join(f"{{}}.{i:06} {page[i % (1 << 18)]:>6}\n" for i in range(10**6))
    with (tmp_path / "t").open("w") as text:
        for at in range((1 << 28) // len(second)):
            text.write(second.replace("{}", str(at)))
    argv = [sys.executable, "-c", CONVERT_AND_TELL_PEAK, "convert", str(tmp_path / "t"), "-o", str(out), "--interval", "1s"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 400 << 10  # KiB
    assert load(out).writes == load(out).nepochs << 18
