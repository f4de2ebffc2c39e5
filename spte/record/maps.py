"""What /proc says of a process: its mappings, its children, whether it can be recorded at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from spte.record.errors import TargetError

_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (..)(.)([ps]) (\S+) (\S+) (\d+) *(.*)$", re.MULTILINE)
_KERNELS_OWN = (b"[vvar]", b"[vvar_vclock]", b"[vdso]", b"[vsyscall]")
USER_END = 1 << 47


class Mapping(NamedTuple):
    """One mapping that can be written: addresses [start, end) in bytes, and what backs it."""

    start: int
    end: int
    shared: bool
    file: bool
    """Backed by a file (its pages come from the page cache until they are written); also shared memory."""
    name: str
    identity: bytes
    """Device, inode and offset."""


def read_mappings(pid: int) -> list[Mapping]:
    """Return the mappings of process `pid` that it can write, now or after mprotect, ascending.

    Private mappings that are read-only now are among them: a page can be written and made read-only between two scans (a linker's
    relocations, code that a compiler makes). A shared mapping that is not writable stays out: what it maps, others write.
    """
    text = _read_maps(pid)
    found = []
    for start, end, rw, _, kind, offset, device, inode, name in _LINE.findall(text):
        shared = kind == b"s"
        if name in _KERNELS_OWN or (shared and rw[1:] != b"w") or int(start, 16) >= USER_END:
            continue
        identity = b" ".join((offset, device, inode))
        found.append(Mapping(int(start, 16), int(end, 16), shared, inode != b"0", name.decode(errors="replace"), identity))
    return found


def _read_maps(pid: int) -> bytes:
    """Return the text of /proc/PID/maps; of another thread where the main one has exited, as its copy is empty then."""
    text = _read(f"/proc/{pid}/maps")
    if not text:
        for thread in _threads(pid):
            text = text or _read(f"/proc/{pid}/task/{thread}/maps")
    return text


def read_children(pid: int) -> dict[int, str]:
    """Return the children that process `pid` has now: pid and command name."""
    children = {}
    for thread in _threads(pid):
        for child in _read(f"/proc/{pid}/task/{thread}/children").split():
            name = _read(f"/proc/{int(child)}/comm").decode(errors="replace").strip()
            if name:
                children[int(child)] = name
    return children


def read_command(pid: int) -> str:
    """Return the command line of process `pid` in one line, else its name in brackets."""
    words = [word.decode(errors="replace") for word in _read(f"/proc/{pid}/cmdline").split(b"\0") if word]
    return " ".join(" ".join(words).split()) or f"[{_read(f'/proc/{pid}/comm').decode(errors='replace').strip()}]"


def check_target(pid: int) -> None:
    """Check that `pid` names a process that can be recorded.

    Raises
    ------
    TargetError
        If not; the message says why.
    """
    if pid == os.getpid():
        raise TargetError(f"pid {pid} is spte record itself; name another process")
    status = dict(line.split(b":\t", 1) for line in _read(f"/proc/{pid}/status").splitlines() if b":\t" in line)
    if not status:
        raise TargetError(f"there is no process {pid}; see `ps -e` for those that run")
    if int(status[b"Tgid"]) != pid:
        raise TargetError(f"{pid} is a thread of process {int(status[b'Tgid'])}; give that pid, all its threads are recorded")
    if status[b"State"][:1] in b"ZX":
        raise TargetError(f"pid {pid} has exited and waits for its parent; there is nothing to record")
    if b"VmSize" not in status:
        raise TargetError(f"pid {pid} is a thread of the kernel, without memory of its own; name a program's process")


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _read(path: str) -> bytes:
    """Return what a file of /proc holds; nothing once its process is gone."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
