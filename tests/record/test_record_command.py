"""`spte record` as a command: what it refuses, in one line, and what it says."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from commandline import files_of_at_most
from record_targets import MEMORIES, needs_tracking, program

from spte.cli.app import run
from spte.cli.verbs.record import live_line
from spte.record import abi
from spte.record.errors import TargetError
from spte.record.journal import Journal
from spte.record.recorder import record
from spte.record.session import Progress
from spte.record.tracing import ptrace
from spte.trace import load


@pytest.fixture
def spte(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = run([str(a) for a in argv])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(spte, tmp_path):
    def call(*argv, code=2):
        got, out, err = spte("record", *argv)
        assert (got, out) == (code, "")
        assert err.startswith("spte record: ")
        assert err.count("\n") == 1
        assert not list(tmp_path.glob("*.npz*"))
        return err

    return call


def test_one_target_is_asked_for(refused):
    for argv in ([], ["--pid", 1, "--", "true"], ["--recover", "x.journal", "--pid", 1]):
        assert "give one of" in refused(*argv)


@pytest.mark.parametrize("text", ["0ms", "-1s", "100", "0.1ms", "2000m", "1e3ms", "ms", "", "999999999999s", "\u0661ms", "nan s"])
def test_intervals_without_sense_are_refused_with_the_value(refused, text):
    assert "1ms to 3600s" in refused(f"--interval={text}", "--", "true")


def test_processes_that_can_not_be_recorded_are_refused_with_the_reason(refused):
    needs_tracking()
    assert "there is no process 4194305" in refused("--pid", 4194305)
    assert "take the pid" in refused("--pid", -4)
    assert "itself" in refused("--pid", os.getpid())
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert "has exited" in refused("--pid", child.pid)


def test_programs_that_can_not_be_run_are_refused_with_the_reason(refused, tmp_path):
    needs_tracking()
    plain = tmp_path / "plain"
    plain.write_text("no program\n")
    assert "Permission denied" in refused("--", plain)
    plain.chmod(0o755)
    assert "Exec format error" in refused("--", plain)
    assert "No such file" in refused("--", "no-such-program-4711")


def test_outputs_that_can_not_be_written_are_refused_before_anything_runs(refused, tmp_path):
    ran = tmp_path / "ran"
    assert "no directory" in refused("-o", "none/t.npz", "--", "touch", ran)
    assert "is a directory" in refused("-o", tmp_path, "--", "touch", ran)
    assert not ran.exists()


def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(refused):
    needs_tracking()
    with files_of_at_most(300):  # below the journal's first records, above the line in the file that captures it
        assert "'trace.npz.journal': File too large; nothing is recorded" in refused("--", "true")


def test_the_library_too_refuses_an_output_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TargetError, match="Not a regular file"):
        record(tmp_path / "fifo", command=["touch", str(tmp_path / "ran")])
    assert [p.name for p in tmp_path.iterdir()] == ["fifo"]


def test_a_symbolic_link_as_output_is_followed(spte, tmp_path):
    needs_tracking()
    (tmp_path / "t.npz").symlink_to("real")
    assert spte("record", "-o", "t.npz", "--", "true")[0] == 0
    assert (tmp_path / "t.npz").is_symlink()
    assert load(tmp_path / "real").nepochs


def test_the_help_tells_what_ctrl_c_in_a_terminal_does(spte):
    assert "reaches a program started with -- CMD too" in " ".join(spte("record", "--help")[1].split())


def test_a_left_over_journal_is_not_overwritten_and_recover_makes_its_trace(spte, tmp_path):
    needs_tracking()
    journal = Journal(tmp_path / "trace.npz")
    journal.about({"format": "spte-trace/1"})
    journal.epoch(7, np.array([[512, 515]]))
    journal.close()
    code, _, err = spte("record", "--", "true")
    assert code == 2
    assert "--recover" in err
    assert spte("record", "--recover", "trace.npz.journal") == (
        0, "", "spte record: trace.npz: 1 epochs, 0.0 s, 3 page writes, 2 MiB of memory\n")  # fmt: skip
    assert load("trace.npz").gfn.tolist() == [0, 1, 2]
    code, _, err = spte("record", "--recover", "trace.npz")
    assert code == 2
    assert "does not end in .journal" in err


def test_the_command_says_how_the_program_ended_and_what_was_written(spte, tmp_path):
    needs_tracking()
    command = program(tmp_path, MEMORIES["private"] + "[memory.write(page) for page in range(9)]\nsys.stdout.flush()\nos._exit(3)")
    code, out, err = spte("record", "--interval", "20ms", "--", *command)
    assert code == 0
    assert out.count("\nw ") == 9
    assert "exited with 3\n" in err
    trace = load("trace.npz")
    assert f"{trace.writes:,} page writes" in err
    assert trace.command == " ".join(command)


def test_options_after_the_program_are_its_own(spte):
    needs_tracking()
    code, out, _ = spte("record", sys.executable, "-I", "-c", "import sys; print(sys.argv)", "--pid", "-o")
    assert (code, out) == (0, "['-c', '--pid', '-o']\n")


def test_the_live_line_shows_epochs_rate_cost_and_children():
    progress = Progress(epochs=12, pages=1000, seconds=1.2, epoch_s=0.1, scan_s=0.001, fault_s=0.002, children={7: "sh"})
    assert live_line(progress) == (
        "12 epochs | 1.2 s | 41.0 MB/s dirtied | tracking: scan 1.0%, faults about 2.0% | children left alone: 7 sh"
    )


# -- a host that lacks a piece --------------------------------------------------------------------------------------------


def failing(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(
    ("where", "name", "what", "says"),
    [
        (abi.platform, "machine", lambda: "aarch64", "x86-64; this machine is aarch64"),
        (ptrace, "syscall", failing(errno.ENOSYS), "CONFIG_USERFAULTFD"),
        (ptrace, "syscall", failing(errno.EPERM), "seccomp"),
        (abi, "FEATURES", {"A_FEATURE_OF_TOMORROW": 1 << 62}, "A_FEATURE_OF_TOMORROW"),
        (abi, "pagemap_scan", failing(errno.ENOTTY), "since Linux 6.7"),
    ],
)
def test_a_missing_piece_is_named_with_exit_code_4(refused, monkeypatch, where, name, what, says):
    monkeypatch.setattr(where, name, what)
    if where is abi:
        needs_userfaultfd()
    assert says in refused("--", "true", code=4)


def needs_userfaultfd():
    try:
        os.close(ptrace.syscall(323, 1))
    except OSError as error:
        pytest.skip(f"userfaultfd: {error.strerror}")
