"""System calls performed by another process: its main thread is stopped, borrowed, and given back as it was.

What must be as before: registers; the mask of blocked signals; a system call that was interrupted (it restarts, as the thread ends
in the same kind of stop that it was found in); a restartable sequence (rseq), whose descriptor the kernel drops once the thread
returns to user mode somewhere else. The stack is not touched.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable

from spte.record.errors import MissingPieceError, TargetError
from spte.record.tracing import ptrace
from spte.record.tracing.restart import has_signal, restarted

NR_CLOSE, NR_USERFAULTFD, NR_PIDFD_GETFD = 3, 323, 438
UFFD_USER_MODE_ONLY = 1
"""An unprivileged process may have such a descriptor. It refuses faults of the kernel, but only those that would wait for
userspace; with WP_ASYNC none does."""
ALL_SIGNALS = (1 << 64) - 1
NO_SYSCALL = (1 << 64) - 1
_INSTRUCTION = b"\x0f\x05"
_SEARCHED = 1 << 24
_RSEQ_CS = 8
"""Offset of rseq_cs in `struct rseq`."""

Wait = Callable[[], int]
"""Wait for the next stop of the thread and return its status; raises when there will be none."""


class Ended(Exception):  # noqa: N818 - no error: the target's end comes at any time
    """The target ended while it was borrowed."""


def fetch_userfaultfd(pid: int, wait: Wait, *, launched: bool) -> tuple[int, int]:
    """Let process `pid` make a userfaultfd, take it over, and close it there.

    Nothing of it is left in the target: once the descriptor that is returned is closed too, by whatever ends this process, the
    kernel forgets all about it and every page is writable as before.

    Parameters
    ----------
    pid : int
        A process whose main thread is seized and in a PTRACE_EVENT_STOP.
    wait : Wait
        Waits for the thread.
    launched : bool
        Whether the process is a child of this one: the seccomp filters that it inherited let the call pass.

    Returns
    -------
    tuple of int
        The descriptor, and the status of the stop that the thread is in at the end: an EVENT_STOP again.

    Raises
    ------
    MissingPieceError
        If the process can not be made to perform the call, or the kernel refuses it.
    Ended
        If the process ends meanwhile.
    """
    try:
        return _fetch(pid, wait, launched)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT):  # killed: even a stopped thread leaves its stop then
            raise Ended from None
        raise


def _fetch(pid: int, wait: Wait, launched: bool) -> tuple[int, int]:
    saved = ptrace.get_registers(pid)
    if saved is None:
        raise MissingPieceError(f"pid {pid} runs 32-bit code; only x86-64 programs can be recorded; take a 64-bit build of it")
    if ptrace.dispatches_syscalls(pid):
        raise MissingPieceError(f"pid {pid} dispatches its own system calls (as Wine does); none can be injected there")
    at = _find_syscall(pid)
    signalled = has_signal(pid)
    suspended = _suspend_seccomp(pid, launched)
    mask = ptrace.get_sigmask(pid)
    rseq = ptrace.get_rseq_address(pid)
    sequence = _peek(pid, rseq + _RSEQ_CS) if rseq else b""
    ptrace.set_sigmask(pid, ALL_SIGNALS)
    thread = _Borrowed(pid, saved, at, wait)
    remote = thread.call(NR_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    descriptor, failure = -1, f"userfaultfd: {os.strerror(-remote)}" if remote < 0 else ""
    if remote >= 0:
        try:
            descriptor = _take(pid, remote)
        except OSError as error:
            failure = f"pidfd_getfd: {error.strerror}"
        thread.call(NR_CLOSE, remote)
    status = thread.give_back()
    ptrace.set_registers(pid, saved if signalled else restarted(saved))
    ptrace.set_sigmask(pid, mask)
    if rseq:
        _poke(pid, rseq + _RSEQ_CS, sequence)
    if suspended:
        ptrace.request(ptrace.SETOPTIONS, pid, 0, ptrace.OPTIONS)
    if thread.stopped:
        os.kill(pid, signal.SIGSTOP)
    if failure:
        raise MissingPieceError(
            f"pid {pid}: {failure}; it takes CONFIG_USERFAULTFD, Linux 5.6 for pidfd_getfd, and a seccomp filter that allows both "
            "(containers: --security-opt seccomp=unconfined)"
        )
    return descriptor, status


class _Borrowed:
    """A thread in a stop whose signals are all blocked."""

    def __init__(self, pid: int, saved: ptrace.Registers, at: int, wait: Wait) -> None:
        self.pid, self.saved, self.at, self.wait = pid, saved, at, wait
        self.stopped = False
        """A SIGSTOP, which no mask holds up, came in between; it is due again at the end."""

    def call(self, number: int, first: int) -> int:
        """Perform the system call `number` with one argument; return what the kernel does, -errno if it fails."""
        # orig_rax: else the kernel takes the interrupted call for the one to restart.
        ptrace.set_registers(self.pid, {**self.saved, "rip": self.at, "rax": number, "rdi": first, "orig_rax": NO_SYSCALL})
        for _ in ("entry", "exit"):
            while True:
                ptrace.request(ptrace.SYSCALL, self.pid)
                status = self.wait()
                if os.WIFSTOPPED(status) and os.WSTOPSIG(status) == ptrace.SYSCALL_STOP:
                    break
                self._pass_over(status)
        registers = ptrace.get_registers(self.pid)
        assert registers is not None
        value = registers["rax"]
        return value - (1 << 64) if value >> 63 else value

    def give_back(self) -> int:
        """Bring the thread from a syscall-exit-stop to an EVENT_STOP, where the kernel restarts calls; return its status."""
        ptrace.request(ptrace.INTERRUPT, self.pid)
        while True:
            ptrace.request(ptrace.CONT, self.pid)
            status = self.wait()
            if os.WIFSTOPPED(status) and ptrace.event_of(status) == ptrace.EVENT_STOP:
                return status
            self._pass_over(status)

    def _pass_over(self, status: int) -> None:
        if not os.WIFSTOPPED(status) or ptrace.event_of(status) == ptrace.EVENT_EXIT:
            raise Ended
        if not ptrace.event_of(status) and os.WSTOPSIG(status) == signal.SIGSTOP:
            self.stopped = True


def _take(pid: int, remote: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        return ptrace.syscall(NR_PIDFD_GETFD, pidfd, remote, 0)
    finally:
        os.close(pidfd)


def _find_syscall(pid: int) -> int:
    """Return the address of a `syscall` instruction: in the vDSO, which nearly every process has, else anywhere."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        code = re.findall(rb"^([0-9a-f]+)-([0-9a-f]+) r.x. \S+ \S+ \d+ *(.*)$", maps.read(), re.MULTILINE)
    for start, end, name in sorted(code, key=lambda mapping: mapping[2] != b"[vdso]"):
        if name == b"[vsyscall]":
            continue
        found = _peek(pid, int(start, 16), min(int(end, 16) - int(start, 16), _SEARCHED)).find(_INSTRUCTION)
        if found >= 0:
            return int(start, 16) + found
    raise TargetError(f"pid {pid} has no syscall instruction in its memory; it can not be recorded")


def _peek(pid: int, address: int, length: int = 8) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, address)


def _poke(pid: int, address: int, data: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), data, address)


def _suspend_seccomp(pid: int, launched: bool) -> bool:
    """Suspend the filters of the stopped thread `pid`, which might kill it for the call; return whether that was needed."""
    filters = _count_filters(pid)
    if not filters or (launched and filters == _count_filters(os.getpid())):
        return False
    try:
        ptrace.request(ptrace.SETOPTIONS, pid, 0, ptrace.OPTIONS | ptrace.O_SUSPEND_SECCOMP)
    except OSError as error:
        raise MissingPieceError(
            f"pid {pid} is under a seccomp filter, which may kill it for the injected call, and to suspend it is refused "
            f"({error.strerror}); run spte record as root, outside of the container"
        ) from None
    return True


def _count_filters(pid: int) -> int:
    with open(f"/proc/{pid}/status", "rb") as status:
        found = re.search(rb"^Seccomp:\s*(\d)\n(?:Seccomp_filters:\s*(\d+))?", status.read(), re.MULTILINE)
    return 0 if not found or found[1] == b"0" else int(found[2] or 1)
