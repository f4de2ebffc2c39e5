"""Files that a command or `save` writes: whole, or the old one stays; what can not be written to or read from is refused in a line."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
from commandline import files_of_at_most, refused, save_toy, spte

from spte._files import write_whole
from spte.cli.params import target
from spte.trace import Trace, load, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trace():
    """A trace that no compression makes small."""
    gfn = np.sort(np.random.default_rng(1).choice(1 << 22, 30_000, replace=False)).astype(np.uint32)
    return Trace(np.array([0, 10]), np.array([0, len(gfn)]), gfn, 1 << 22, {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [None, b"old"])
def test_on_a_full_disk_the_old_file_stays_and_the_error_names_the_file(tmp_path, trace, old):
    path = tmp_path / "t.npz"
    if old:
        path.write_bytes(old)
    with files_of_at_most(8192), pytest.raises(OSError, match=r"File too large: '.*/t\.npz'"):
        save(trace, path)
    assert names(tmp_path) == (["t.npz"] if old else [])
    assert not old or path.read_bytes() == old


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, trace):
    def interrupted(stream, **arrays):
        stream.write(b"half of the new")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    path = tmp_path / "t.npz"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        save(trace, path)
    assert (names(tmp_path), path.read_bytes()) == (["t.npz"], b"old")


def test_a_full_disk_is_one_line_with_the_file(capsys, tmp_path):
    with files_of_at_most(64):
        said = refused(capsys, "generate", "uniform", "--memory", "2M", "--duration", "1s", "--rate", "1MB/s", "-o", tmp_path / "t.npz")
    assert "t.npz" in said
    assert names(tmp_path) == []


@pytest.mark.parametrize("option", [("--output", "o.txt"), ("--plot", "o.png"), ("--report", "o.html")])
@pytest.mark.parametrize("verb", ["profile", "migrate"])
def test_on_a_full_disk_what_a_verb_wrote_before_stays(capsys, tmp_path, verb, option):
    if option[0] == "--report":
        pytest.importorskip("plotly", reason="needs plotly: pip install 'kvm-spte[report]'")
    name, (flag, out) = save_toy(tmp_path / "toy.npz"), option
    (tmp_path / out).write_bytes(b"old")
    spte(capsys, verb, name, "--platform", "npt")  # compiles what is not in the cache
    with files_of_at_most(64):
        code, _, err = spte(capsys, verb, name, "--platform", "npt", flag, tmp_path / out)
    assert (code, err.count("\n")) == (2, 1)
    assert out in err
    assert names(tmp_path) == sorted([out, "toy.npz"])
    assert (tmp_path / out).read_bytes() == b"old"


def test_text_goes_into_a_device_or_a_fifo_as_it_stands(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(fifo, "text\n")
    assert os.read(reader, 99) == b"text\n"
    os.close(reader)
    write_whole(os.devnull, "text")
    assert not Path(os.devnull).is_file()


def test_a_symbolic_link_is_followed_and_the_mode_stays(tmp_path, trace):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "t.npz", tmp_path / "there" / "real.npz"
    link.symlink_to(file)
    for mode in (0o600, 0o640):
        save(trace, link)
        assert link.is_symlink()
        assert load(file).writes == trace.writes
        file.chmod(mode)
    save(trace, link)
    assert file.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path / "there") == ["real.npz"]


@pytest.fixture(params=["fifo", "device", "loop"])
def special(tmp_path, request):
    path = tmp_path / "out.npz"
    if request.param == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/null", "loop": "out.npz"}[request.param])
    return path


def test_what_is_no_regular_file_is_not_replaced(tmp_path, capsys, trace, special):
    before = special.lstat()
    with pytest.raises(OSError, match=r"regular file|symbolic links"):
        save(trace, special)
    for argv in (["generate", "uniform", "-o", special], ["record", "-o", special, "--", "true"], ["convert", "x", "-o", special]):
        assert "can not be written (" in refused(capsys, *argv)
    assert (names(tmp_path), special.lstat().st_ino) == (["out.npz"], before.st_ino)


def test_what_is_written_from_start_to_end_may_go_to_a_device_or_fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in (os.devnull, str(tmp_path / "fifo"), str(tmp_path / "new")):
        assert target(stream=True)(name) == Path(name)
    (tmp_path / "link").symlink_to(tmp_path / "none" / "file")
    for stream in (False, True):
        with pytest.raises(click.BadParameter, match=r"no directory .*/none"):
            target(stream=stream)(str(tmp_path / "link"))


# -- closed streams, and Ctrl-C -------------------------------------------------------------------------------------------


def test_a_closed_stdout_is_refused_before_anything_is_done(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    assert "standard output is closed" in refused(capsys, "generate", "uniform", "-o", tmp_path / "t.npz")
    assert names(tmp_path) == []


def test_a_closed_stderr_is_no_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert spte(capsys, "show", "sqlite", "--json")[0] == 0
    assert spte(capsys, "show", "no-such-file")[0] == 2
    sys.stderr.close()


def test_a_closed_stdin_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin, which is closed" in refused(capsys, "convert", "-", "-o", tmp_path / "t.npz")


def test_ctrl_c_while_the_package_is_imported_is_one_line(tmp_path):
    """NumPy makes an ImportError of an interrupt of its own import: the package here does so too."""
    (tmp_path / "spte").mkdir()
    (tmp_path / "spte" / "__init__.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    [0 for _ in range(1000)]\n"
        "except KeyboardInterrupt:\n    raise ImportError\n"
    )
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["spte"].split(":")
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from {module} import {function}; {function}()"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "spte: interrupted\n")
