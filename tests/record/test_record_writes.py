"""Real recordings of programs that say what they wrote: no write is lost, none is invented."""

import shutil
import subprocess

import pytest
from record_targets import MEMORIES, ROUNDS, compare, descriptors, needs_tracking, program

from spte.record.recorder import record
from spte.trace import load

READ_FIRST = """
total = sum(memory.map[page * 4096] for page in range(memory.npages))
time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def tracking():
    needs_tracking()


@pytest.fixture
def recorded(tmp_path, capfd):
    def run(body, interval=0.02, command=()):
        """Record the program; returns the recording and what the program printed."""
        before = descriptors()
        done = record(tmp_path / "t.npz", interval, command=command or program(tmp_path, body))
        assert descriptors() == before
        assert done.trouble is None
        assert load(tmp_path / "t.npz").gfn.tolist() == done.trace.gfn.tolist()
        assert not list(tmp_path.glob("t.npz?*"))
        return done, capfd.readouterr().out

    return run


@pytest.mark.parametrize("kind", MEMORIES)
def test_every_written_page_is_in_its_epoch_and_no_other_page(recorded, kind):
    done, out = recorded(MEMORIES[kind] + ROUNDS)
    compare(done.trace, out)
    assert done.trace.npages % 512 == 0
    assert done.ended.endswith("exited with 0")


@pytest.mark.parametrize("kind", ["private", "private file", "shared file"])
def test_pages_that_are_only_read_are_not_reported(recorded, kind):
    done, out = recorded("time.sleep(0.5)\n" + MEMORIES[kind] + "time.sleep(0.5)\n" + READ_FIRST + ROUNDS)
    compare(done.trace, out)


def test_writes_of_the_kernel_for_the_program_are_reported(recorded):
    done, out = recorded("""
        memory = Memory("m", 64, flags=PRIVATE)
        source, sink = os.pipe()
        for page in range(0, 64, 3):
            os.write(sink, b"x")
            a = now()
            os.readv(source, [memoryview(memory.map)[page * 4096 : page * 4096 + 1]])
            print("w", "m", page, a, now())
            time.sleep(0.004)
        """)
    compare(done.trace, out)


def test_threads_and_mappings_that_come_and_move_are_followed(recorded):
    done, out = recorded("""
        def work(k):
            for turn in range(3):
                memory = Memory(f"m{k}.{turn}", 64, flags=PRIVATE)
                kept.append(memory)
                for page in range(k, 64, 3):
                    memory.write(page)
                time.sleep(0.025)
                for page in range(k, 64, 5):
                    memory.write(page)
        kept = []
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        """)
    compare(done.trace, out)


def test_a_page_made_read_only_before_the_scan_is_reported(recorded):
    done, out = recorded("""
        memory = Memory("m", 64, flags=PRIVATE)
        for turn in range(3):
            libc.mprotect(ctypes.c_void_p(memory.base << 12), 64 * 4096, 3)
            for page in range(turn, 64, 4):
                memory.write(page)
            libc.mprotect(ctypes.c_void_p(memory.base << 12), 64 * 4096, 1)
            time.sleep(0.05)
        """)
    compare(done.trace, out)


def test_after_a_fork_the_writes_of_the_parent_are_reported_and_the_child_is_named(recorded):
    done, out = recorded("""
        memory = Memory("m", 64, flags=PRIVATE)
        for page in range(0, 64, 2):
            memory.write(page)
        time.sleep(0.05)
        child = os.fork()
        if not child:
            for page in range(64):
                memory.map[page * 4096] = 2
            print("tracked:", any(" uw" in line for line in open("/proc/self/smaps") if line.startswith("VmFlags")), flush=True)
            time.sleep(1)
            os._exit(0)
        for page in range(0, 64, 3):
            memory.write(page)
        time.sleep(0.7)
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        """)
    compare(done.trace, out)
    assert "tracked: False" in out
    assert len(done.children) == 1
    assert done.trace.meta["children"] == {str(pid): name for pid, name in done.children.items()}


def test_a_program_that_ends_within_its_first_epoch_is_recorded(recorded):
    done, out = recorded("memory = Memory('m', 100, flags=PRIVATE)\nfor page in range(0, 100, 3):\n    memory.write(page)\n", interval=60)
    compare(done.trace, out)
    assert done.trace.nepochs == 1


@pytest.mark.parametrize("wrapper", [["sh", "-c", 'exec "$@"', "sh"], ["env", "A=1", "nice", "-n", "1"]], ids=["sh", "env nice"])
def test_a_wrapper_that_performs_exec_does_not_end_the_recording(recorded, tmp_path, wrapper):
    command = program(tmp_path, MEMORIES["private"] + ROUNDS)
    done, out = recorded("", command=[*wrapper, *command])
    compare(done.trace, out)
    assert done.trace.command == " ".join(command)


def test_an_exec_in_the_middle_by_another_thread_is_followed(recorded, tmp_path):
    second = program(tmp_path, MEMORIES["private"] + ROUNDS, "second.py")
    done, out = recorded(f"""
        memory = Memory("first", 64, flags=PRIVATE)
        for page in range(0, 64, 3):
            memory.write(page)
        sys.stdout.flush()
        time.sleep(0.1)
        threading.Thread(target=os.execv, args=({second[0]!r}, {second!r})).start()
        time.sleep(10)
        """)
    compare(done.trace, out)
    assert done.ended.endswith("exited with 0")


def test_a_static_binary_is_recorded(recorded, tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "s.c").write_text("int main(void) { static char a[1 << 20]; for (int i = 0; i < 1 << 20; i += 8192) a[i] = 1; }\n")
    built = subprocess.run(["gcc", "-static", "-o", "s", "s.c"], cwd=tmp_path, capture_output=True, check=False)
    if built.returncode:
        pytest.skip("needs a static libc")
    done, _ = recorded("", command=[str(tmp_path / "s")])
    assert done.trace.writes >= 128


def test_a_32_bit_program_is_refused(tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "s.c").write_text("void _start(void) { for (;;); }\n")
    built = subprocess.run(["gcc", "-m32", "-static", "-nostdlib", "-o", "s", "s.c"], cwd=tmp_path, capture_output=True, check=False)
    if built.returncode:
        pytest.skip("needs gcc -m32")
    with pytest.raises(Exception, match="32-bit"):
        record(tmp_path / "t.npz", command=[str(tmp_path / "s")])
    assert not list(tmp_path.glob("t.npz*"))


@pytest.mark.long
def test_gigabytes_are_recorded_in_bounded_memory(recorded):
    done, _ = recorded("""
        memory = Memory("m", 1 << 19, flags=PRIVATE)
        reserve = mmap.mmap(-1, 1 << 40, flags=PRIVATE | 0x4000)
        for page in range(0, 1 << 19, 64):
            memory.write(page)
        libc.memset(ctypes.c_void_p(memory.base << 12), 1, 1 << 30)
        time.sleep(1)
        for page in range(0, 1 << 19, 1024):
            memory.write(page)
        """, interval=0.2)  # fmt: skip
    assert done.trace.npages < 1 << 20
    assert done.trace.writes >= 1 << 18
