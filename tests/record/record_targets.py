"""Programs to record that print what they write and when, and the comparison of that with the trace."""

import collections
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from spte.record import abi
from spte.record.errors import MissingPieceError

PREAMBLE = """
import ctypes, ctypes.util, mmap, os, signal, sys, threading, time
now = time.monotonic_ns
libc = ctypes.CDLL(None)

class Memory:
    def __init__(self, name, npages, **kinds):
        self.name, self.npages = name, npages
        self.map = mmap.mmap(kinds.pop("fd", -1), npages * 4096, **kinds)
        self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) >> 12
        print("map", name, self.base, npages, flush=True)

    def write(self, page):
        a = now()
        self.map[page * 4096] = 1
        print("w", self.name, page, a, now())

PRIVATE, SHARED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
"""
ROUNDS = """
for turn in range(4):
    for page in range(turn, memory.npages, 7 + turn):
        memory.write(page)
    time.sleep(0.03)
"""

FILE = """
with open(sys.argv[0] + ".data", "w+b") as file:
    file.truncate(512 * 4096)
    memory = Memory("m", 512, fd=file.fileno(), flags={flags})
"""
MEMORIES = {
    "private": "memory = Memory('m', 512, flags=PRIVATE)\n",
    "shared": "memory = Memory('m', 512, flags=SHARED)\n",
    "private file": FILE.format(flags="mmap.MAP_PRIVATE"),
    "shared file": FILE.format(flags="mmap.MAP_SHARED"),
}


def needs_tracking():
    """Skip where the kernel lacks a piece; the reason is what the command would say."""
    try:
        abi.require()
    except MissingPieceError as error:
        pytest.skip(str(error))


def program(tmp_path, body, name="target.py"):
    """Write a program that ends with its memory still mapped; returns its command."""
    path = tmp_path / name
    path.write_text(PREAMBLE + textwrap.dedent(body) + "\nsys.stdout.flush()\nos._exit(0)\n")
    return [sys.executable, "-I", "-S", str(path)]


class Log:
    """What a program printed: its mappings, and its writes as (page number, begin, end) in ns."""

    def __init__(self, text):
        self.writes = collections.defaultdict(list)
        self.mapped = set()
        bases = {}
        for line in text.splitlines():
            match line.split():
                case ["map", name, base, npages]:
                    bases[name] = int(base)
                    self.mapped.update(range(int(base), int(base) + int(npages)))
                case ["w", name, page, begin, end]:
                    self.writes[bases[name] + int(page)].append((int(begin), int(end)))


def pages_of_epochs(trace):
    """{virtual page number: epochs that wrote it}."""
    epochs = collections.defaultdict(list)
    for epoch in range(trace.nepochs):
        gfn = trace.epoch(epoch).astype(np.int64)
        for first, npages, address in trace.meta["ranges"]:
            inside = gfn[(gfn >= first) & (gfn < first + npages)]
            for page in (inside - first + (int(address, 16) >> 12)).tolist():
                epochs[page].append(epoch)
    return epochs


def compare(trace, text):
    """Assert that every write is in its epoch, and that no other page of the program's mappings is in any.

    An epoch ends as its scan begins, so a write during the scan may be in that epoch or in the next.
    """
    log = Log(text)
    bounds = (trace.t_ns + trace.meta["start_monotonic_ns"]).tolist()
    bounds.append(bounds[-1] + 10**12)

    def may_be_of(epoch, begin, end):
        return bounds[epoch] <= end and begin <= bounds[epoch + 2]

    found = pages_of_epochs(trace)
    whole = bounds[-2]
    lost = [(page, begin, end) for page, writes in log.writes.items() for begin, end in writes
            if end < whole and not any(may_be_of(epoch, begin, end) for epoch in found[page])]  # fmt: skip
    over = [(page, epoch) for page, epochs in found.items() if page in log.mapped
            for epoch in epochs if not any(may_be_of(epoch, *write) for write in log.writes[page])]  # fmt: skip
    shown = f"lost {len(lost)}: {lost[:3]}; reported without a write {len(over)}: {over[:3]}; bounds {bounds[:8]}"
    assert not lost + over, shown
    assert log.writes
    return log


def run_recorder(output, interval, *, pid=0, command=(), **options):
    """Start the recorder in a process of its own, without what the command line loads; its last line is how it ended."""
    package = Path(abi.__file__).parents[1]
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a run in the background ignores it, and inherits that
        f"import sys, types; spte = types.ModuleType('spte'); spte.__path__ = [{str(package)!r}]; sys.modules['spte'] = spte; "
        "from pathlib import Path; from spte.record.recorder import record; "
        "print(record(Path(sys.argv[1]), float(sys.argv[2]), pid=int(sys.argv[3]), command=sys.argv[4:]).ended, flush=True)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(output), str(interval), str(pid), *command], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


def status(pid, field):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split("\t")[1] for line in lines if line.startswith(field + ":"))


def is_tracked(pid):
    """Whether any mapping of the process is registered with a userfaultfd."""
    return any(line.startswith("VmFlags:") and " uw" in line for line in Path(f"/proc/{pid}/smaps").read_text().splitlines())


def descriptors(pid="self"):
    return len(os.listdir(f"/proc/{pid}/fd"))
