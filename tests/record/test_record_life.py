"""How a recording begins and ends: attached, interrupted, killed; the target runs on unharmed and the file is whole."""

import os
import random
import resource
import signal
import subprocess
import time

import pytest
from record_targets import MEMORIES, compare, is_tracked, needs_tracking, program, run_recorder, status

from spte.record.errors import TargetError
from spte.record.journal import finish
from spte.trace import load

# The C library is asked, as CPython repeats a call that ends with EINTR.
ENDLESS = MEMORIES["private"] + """
bad = caught = 0
def catch(*_):
    global caught
    caught += 1
signal.signal(signal.SIGUSR1, catch)
import select
epoll = select.epoll()
timeout = (ctypes.c_long * 2)(0, 20_000_000)
while not os.path.exists(sys.argv[0] + ".end"):
    for page in range(0, 512, 3):
        memory.write(page)
    sys.stdout.flush()
    begin = now()
    bad += libc.nanosleep(timeout, None) != 0 or now() - begin < 20_000_000
    begin = now()
    bad += libc.epoll_wait(epoll.fileno(), ctypes.create_string_buffer(16), 1, 20) != 0 or now() - begin < 19_000_000
print("bad", bad, "caught", caught)
"""


@pytest.fixture(autouse=True)
def tracking():
    needs_tracking()


def wait_for(what, process=None):
    deadline = time.monotonic() + 60
    while not what():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Target:
    """A program that runs until it is told to end."""

    def __init__(self, tmp_path, body=ENDLESS):
        self.log, self.end_file = tmp_path / "log", tmp_path / "target.py.end"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(program(tmp_path, body), stdout=log)
        self.pid = self.process.pid
        wait_for(lambda: "\nw " in self.text(), self.process)

    def text(self):
        return self.log.read_text()

    def end(self):
        """Let it end; it says whether any of its calls went wrong."""
        self.end_file.touch()
        assert self.process.wait(60) == 0
        assert "\nbad 0 " in self.text()
        return self.text()


@pytest.fixture
def target(tmp_path):
    target = Target(tmp_path)
    yield target
    target.process.kill()
    target.process.wait()


def ended(recorder, code=0):
    out, err = recorder.communicate(timeout=60)
    assert recorder.returncode == code, err
    return out, err


def is_free(pid):
    return status(pid, "TracerPid") == "0" and not is_tracked(pid)


def has_epochs(path):
    journal = path.with_name(path.name + ".journal")
    return lambda: journal.exists() and journal.read_bytes().count(b"EPOC") >= 5


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_closes_the_file_whole_and_the_attached_process_runs_on(tmp_path, target, sig):
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    assert status(target.pid, "TracerPid") != "0"
    before = target.text()
    recorder.send_signal(sig)
    assert ended(recorder) == (f"{sig.name}; pid {target.pid} ran on\n", "")
    assert is_free(target.pid)
    wait_for(lambda: len(target.text()) > len(before), target.process)
    trace = load(tmp_path / "t.npz")
    log = compare_since_start(trace, target.end())
    assert log.writes
    assert not list(tmp_path.glob("t.npz?*"))


def compare_since_start(trace, text):
    """Compare, leaving out what was written before the recording began."""
    start = trace.meta["start_monotonic_ns"]
    kept = [line for line in text.splitlines() if not line.startswith("w ") or int(line.split()[3]) >= start]
    return compare(trace, "\n".join(kept))


def test_what_was_written_before_attaching_is_memory_but_no_write(tmp_path):
    body = MEMORIES["private"] + "for page in range(512):\n    memory.write(page)\nsys.stdout.flush()\n" + \
        "while not os.path.exists(sys.argv[0] + '.end'):\n    time.sleep(0.02)\nprint('bad 0 ')\n"  # fmt: skip
    target = Target(tmp_path, body)
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    recorder.send_signal(signal.SIGINT)
    ended(recorder)
    target.end()
    trace = load(tmp_path / "t.npz")
    base = int(target.text().split()[2]) << 12
    place = [first + (base - int(address, 16) >> 12) for first, npages, address in trace.meta["ranges"]
             if 0 <= base - int(address, 16) < npages << 12]  # fmt: skip
    assert len(place) == 1
    assert not set(range(place[0], place[0] + 512)) & set(trace.gfn.tolist())


def test_signals_reach_the_target_and_job_control_stops_it_as_before(tmp_path, target):
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    target.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: status(target.pid, "State")[0] in "Tt")
    time.sleep(0.1)
    assert status(target.pid, "State")[0] in "Tt"
    target.process.send_signal(signal.SIGCONT)
    wait_for(lambda: status(target.pid, "State")[0] in "RS")
    target.process.send_signal(signal.SIGCHLD)  # ignored: must not be noticed
    recorder.send_signal(signal.SIGINT)
    ended(recorder)
    target.end_file.touch()
    assert target.process.wait(30) == 0


def test_a_stopped_process_is_recorded_and_stays_stopped(tmp_path, target):
    target.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: status(target.pid, "State")[0] == "T")
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    assert status(target.pid, "State")[0] in "Tt"
    recorder.send_signal(signal.SIGINT)
    ended(recorder)
    wait_for(lambda: status(target.pid, "State")[0] == "T")
    assert is_free(target.pid)
    target.process.send_signal(signal.SIGCONT)
    target.end_file.touch()
    assert target.process.wait(30) == 0


def test_a_killed_recorder_loses_at_most_its_last_epoch_and_the_target_runs_on(tmp_path, target):
    output = tmp_path / "t.npz"
    recorder = run_recorder(output, 0.02, pid=target.pid)
    wait_for(has_epochs(output), recorder)
    with pytest.raises(TargetError, match="is being recorded now"):
        finish(tmp_path / "t.npz.journal", output)
    recorder.kill()
    recorder.communicate()
    killed = time.monotonic_ns()
    wait_for(lambda: is_free(target.pid), target.process)
    assert not output.exists()
    second = run_recorder(output, 0.02, pid=target.pid)
    _, err = ended(second, code=1)
    assert "--recover" in err
    trace = finish(tmp_path / "t.npz.journal", output)
    compare_since_start(trace, target.end())
    assert load(output).writes == trace.writes
    assert "ended" not in trace.meta
    assert trace.meta["start_monotonic_ns"] + int(trace.t_ns[-1]) > killed - 2_000_000_000
    assert sorted(p.name for p in tmp_path.glob("t.npz*")) == ["t.npz"]


def test_a_launched_program_outlives_a_killed_recorder(tmp_path):
    command = program(tmp_path, ENDLESS)
    log = tmp_path / "log"
    recorder = run_recorder(tmp_path / "t.npz", 0.02, command=["sh", "-c", f'exec "$@" > {log} 2>&1', "sh", *command])
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    wait_for(lambda: "\nw " in log.read_text(), recorder)
    recorder.kill()
    recorder.communicate()
    time.sleep(0.2)
    (tmp_path / "target.py.end").touch()
    wait_for(lambda: "\nbad 0 " in log.read_text())
    compare(finish(tmp_path / "t.npz.journal", tmp_path / "t.npz"), log.read_text())


def test_ctrl_c_goes_to_the_program_too_and_its_end_is_recorded(tmp_path):
    body = MEMORIES["private"] + """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
signal.sigwait([signal.SIGINT])  # a handler that prints could come in the middle of the print before
for page in range(0, 512, 2):
    memory.write(page)
sys.stdout.flush()
os._exit(5)
"""
    recorder = run_recorder(tmp_path / "t.npz", 60, command=program(tmp_path, body), start_new_session=True)
    assert recorder.stdout.readline().startswith("map")
    assert recorder.stdout.readline() == "ready\n"
    os.killpg(recorder.pid, signal.SIGINT)
    out, _ = ended(recorder)
    trace = load(tmp_path / "t.npz")
    assert out.splitlines()[-1] == trace.meta["ended"] == f"pid {trace.meta['pid']} exited with 5"


@pytest.mark.parametrize(
    ("handler", "says"),
    [("", "pid {} was killed by SIGINT"), ("trap '' INT; ", "SIGINT; pid {} ran on")],
    ids=["ends", "ignores it"],
)
def test_after_ctrl_c_it_says_whether_the_program_ended(tmp_path, handler, says):
    command = ["sh", "-c", f"{handler}echo ready; exec sleep 60 > /dev/null 2>&1"]
    recorder = run_recorder(tmp_path / "t.npz", 60, command=command, start_new_session=True)
    assert recorder.stdout.readline() == "ready\n"
    os.killpg(recorder.pid, signal.SIGINT)
    out, _ = ended(recorder)
    pid = load(tmp_path / "t.npz").meta["pid"]
    if handler:
        os.kill(pid, signal.SIGKILL)
    assert out == says.format(pid) + "\n"


def test_the_targets_death_by_a_signal_closes_the_file(tmp_path, target):
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    target.process.kill()
    assert ended(recorder) == (f"pid {target.pid} was killed by SIGKILL\n", "")
    compare_since_start(load(tmp_path / "t.npz"), target.text())


@pytest.mark.parametrize(("sig", "name"), [(33, "signal 33"), (34, "SIGRTMIN"), (40, "signal 40")])
def test_a_signal_without_a_name_is_told_by_its_number(tmp_path, sig, name):
    recorder = run_recorder(tmp_path / "t.npz", 60, command=["sh", "-c", f"kill -{sig} $$"])
    out, _ = ended(recorder)
    assert out == f"pid {load(tmp_path / 't.npz').meta['pid']} was killed by {name}\n"
    assert not list(tmp_path.glob("t.npz?*"))


def test_a_file_of_that_name_is_replaced_at_the_end_only(tmp_path, target):
    (tmp_path / "t.npz").write_text("old")
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    assert (tmp_path / "t.npz").read_text() == "old"
    recorder.send_signal(signal.SIGINT)
    ended(recorder)
    assert load(tmp_path / "t.npz").nepochs > 1


def test_a_traced_process_is_refused_with_its_tracer(tmp_path, target):
    first = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), first)
    second = run_recorder(tmp_path / "u.npz", 0.02, pid=target.pid)
    _, err = ended(second, code=1)
    assert f"is traced by pid {status(target.pid, 'TracerPid')} already" in err
    assert not list(tmp_path.glob("u.npz*"))
    first.send_signal(signal.SIGINT)
    ended(first)


def test_a_killed_tracer_ends_the_recording_whole(tmp_path, target):
    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid)
    wait_for(has_epochs(tmp_path / "t.npz"), recorder)
    os.kill(int(status(target.pid, "TracerPid")), signal.SIGKILL)
    out, _ = ended(recorder)
    assert out == "the process that traces the target was killed\n"
    assert is_free(target.pid)
    compare_since_start(load(tmp_path / "t.npz"), target.end())


def test_a_full_disk_ends_the_recording_with_the_last_whole_epoch(tmp_path, target):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    recorder = run_recorder(tmp_path / "t.npz", 0.02, pid=target.pid, preexec_fn=limit)
    out, _ = ended(recorder)
    assert "File too large; the recording ends with the last whole epoch" in out
    compare_since_start(load(tmp_path / "t.npz"), target.end())


@pytest.mark.long
def test_a_recorder_killed_at_any_instant_does_no_harm(tmp_path, target):
    """Also in the moment in which the target's registers are borrowed."""
    chance = random.Random(7)
    output = tmp_path / "t.npz"
    for _ in range(60):
        recorder = run_recorder(output, 0.005, pid=target.pid)
        time.sleep(chance.uniform(0.05, 0.6))
        recorder.kill()
        recorder.communicate()
        (tmp_path / "t.npz.journal").unlink(missing_ok=True)
    wait_for(lambda: is_free(target.pid), target.process)
    target.end()
