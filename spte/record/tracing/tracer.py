"""The tracer: a process of its own that follows the target through exec and exit, and tells the recorder.

It is a process, not a thread, for two reasons. A recorder that is killed at any instant must not leave the target with borrowed
registers: the tracer finishes what it began and then goes, as its socket has ended. And a signal for the target, which ptrace
shows to the tracer first, must not wait for a scan.

Messages to the recorder are JSON objects with ``event``:

========== ========================================================================================================
``memory``   a new address space, ``pid``; a userfaultfd of it comes along; the target stands still until ``go``
``exit``     the target is about to exit, its memory still there; it stands still until ``go``
``over``     it has exited: ``code``, or ``signal``, or neither if that is not known
``error``    it can not be recorded: ``kind`` (target, missing), ``text``
========== ========================================================================================================

The end of the socket, from either side, ends the tracer; the kernel then lets the target run on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import socket
import time
from typing import Any, NoReturn

from spte.record.errors import MissingPieceError, RecordError, TargetError
from spte.record.tracing import ptrace
from spte.record.tracing.inject import Ended, fetch_userfaultfd
from spte.record.tracing.restart import has_signal, is_ignored, restarted

GO = b"go"
STOP_TIMEOUT_S = 10.0
"""How long a target may take to its first stop: a thread in an uninterruptible wait, such as vfork's, does not stop before."""
_POLL_S = 0.01
"""How often to look whether another thread has performed an exec, once the main one is gone."""
_TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)


class _Left(Exception):  # noqa: N818 - no error: the recorder has gone
    """The recorder closed its end."""


class _Tracer:
    def __init__(self, channel: socket.socket, pid: int, wake: int) -> None:
        self.channel, self.pid, self.wake = channel, pid, wake
        self.launched = False
        self.leader_gone = False
        """The main thread went through its exit: what comes next may be an exec by another thread, which nobody announces."""

    # -- stops ---------------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None, *, leave: bool = True) -> int:
        """Wait for the next status of the main thread; raises TimeoutError, and with `leave` _Left when the recorder goes first."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG | ptrace.WALL)
            if found:
                return status
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            watched = (self.wake, self.channel.fileno()) if leave else (self.wake,)
            ready, _, _ = select.select(watched, (), (), left)
            if self.wake in ready:
                os.read(self.wake, 4096)
            elif ready:
                raise _Left  # nothing is asked while the target runs: this is the end

    def wait_borrowed(self) -> int:
        """Wait for the next status of a thread that must be given back as it was, even if the recorder has gone."""
        return self.wait(leave=False)

    def seize(self) -> None:
        try:
            ptrace.request(ptrace.SEIZE, self.pid, 0, ptrace.OPTIONS)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise TargetError(f"pid {self.pid} has ended") from None
            raise MissingPieceError(_why_not(self.pid, error)) from None

    def stop(self, status: int | None) -> int:
        """Bring the target to an EVENT_STOP, from the stop of `status` or running if None; return the new status."""
        ptrace.request(ptrace.INTERRUPT, self.pid)
        if status is not None:
            self.resume(status)
        while True:
            try:
                status = self.wait(STOP_TIMEOUT_S, leave=False)
            except TimeoutError:
                raise TargetError(
                    f"pid {self.pid} did not stop in {STOP_TIMEOUT_S:g} s; it waits in the kernel (see /proc/{self.pid}/stack)"
                ) from None
            if not os.WIFSTOPPED(status) or ptrace.event_of(status) == ptrace.EVENT_EXIT:
                raise Ended
            if ptrace.event_of(status) == ptrace.EVENT_STOP:
                return status
            self.resume(status)

    def resume(self, status: int) -> None:
        """Let the target go on from a stop as if nobody had looked: stopped by job control, or with its signal."""
        event, sig = ptrace.event_of(status), os.WSTOPSIG(status)
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # killed in its stop: the next status tells
            if event == ptrace.EVENT_STOP and sig in ptrace.GROUP_STOPS:
                ptrace.request(ptrace.LISTEN, self.pid)
            elif event or sig == ptrace.SYSCALL_STOP:
                ptrace.request(ptrace.CONT, self.pid)
            else:
                if is_ignored(self.pid, sig) and not has_signal(self.pid):
                    self.restart_call()  # untraced it would not have been woken
                ptrace.request(ptrace.CONT, self.pid, 0, sig)

    def restart_call(self) -> None:
        registers = ptrace.get_registers(self.pid)
        if registers and (again := restarted(registers)) is not registers:
            ptrace.set_registers(self.pid, again)

    # -- what the recorder is told ---------------------------------------------------------------------------------------

    def tell(self, event: str, *descriptors: int, **values: Any) -> None:
        try:
            socket.send_fds(self.channel, [json.dumps({"event": event, **values}).encode()], descriptors)
        except OSError:
            raise _Left from None

    def await_go(self) -> None:
        if self.channel.recv(16) != GO:
            raise _Left

    def share_memory(self, status: int | None = None) -> None:
        """Stop the target, hand its userfaultfd to the recorder, and let it go on once that has armed its pages."""
        self.stop(status)
        descriptor, status = fetch_userfaultfd(self.pid, self.wait_borrowed, launched=self.launched)
        self.tell("memory", descriptor, pid=self.pid)
        os.close(descriptor)
        self.await_go()
        self.resume(status)

    # -- the target's life ---------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Follow the target to its end."""
        while True:
            try:
                status = self.wait(_POLL_S if self.leader_gone else None)
            except (TimeoutError, ChildProcessError):
                if not self.attach_again():
                    raise Ended from None
                continue
            if not os.WIFSTOPPED(status):
                how = {"code": os.WEXITSTATUS(status)} if os.WIFEXITED(status) else {"signal": os.WTERMSIG(status)}
                self.tell("over", **how)
                return
            event = ptrace.event_of(status)
            if event == ptrace.EVENT_EXEC:
                # Still inside execve, which has its result to store: the injection waits for the way back to user mode.
                self.share_memory(status)
            else:
                if event == ptrace.EVENT_EXIT:
                    self.leader_gone = True
                    self.tell("exit")
                    self.await_go()
                self.resume(status)

    def attach_again(self) -> bool:
        """Seize the thread that took over the pid by an exec, if one did; return whether the process is still there."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as file:
                text = file.read()
        except OSError:
            return _exists(self.pid)  # just as the exec exchanges the threads there is nothing to read
        if re.search(rb"^TracerPid:\t0$", text, re.MULTILINE) and not re.search(rb"^State:\t[ZX]", text, re.MULTILINE):
            self.seize()
            self.leader_gone = False
            self.share_memory()
        return True

    def launch(self, command: list[str]) -> None:
        """Start `command`, a child that is seized before it becomes the program, and follow it."""
        ready, go = os.pipe()
        failed, fail = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(go)
            _become(command, ready, fail)
        os.close(fail)
        self.launched = True
        self.seize()
        os.write(go, b"g")
        while True:
            status = self.wait()
            if os.WIFSTOPPED(status) and ptrace.event_of(status) == ptrace.EVENT_EXEC:
                break
            if not os.WIFSTOPPED(status):
                code = int(os.read(failed, 16) or 0)
                raise TargetError(f"{command[0]!r} can not be run: {os.strerror(code)}; give a program and its arguments")
            self.resume(status)
        try:
            self.share_memory(status)
        except RecordError:
            os.kill(self.pid, signal.SIGKILL)  # it has not run a single instruction of its own
            raise
        self.follow()


def _become(command: list[str], ready: int, fail: int) -> NoReturn:
    try:
        os.read(ready, 1)
        for sig in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored stays so
            signal.signal(sig, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(fail, str(error.errno).encode())
    finally:
        os._exit(127)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _why_not(pid: int, error: OSError) -> str:
    """Say why a process can not be traced, and what helps."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            tracer = re.search(rb"^TracerPid:\t(\d+)$", file.read(), re.MULTILINE)
        if tracer and tracer[1] != b"0":
            return f"pid {pid} is traced by pid {tracer[1].decode()} already; end that first"
        with open("/proc/sys/kernel/yama/ptrace_scope", "rb") as file:
            scope = file.read().strip().decode()
    except OSError:
        scope = "0"
    if scope != "0" and os.geteuid():
        return (
            f"pid {pid} may not be traced: kernel.yama.ptrace_scope is {scope}; run as root, set it to 0 (sysctl), or start the "
            "program with `spte record -- CMD`"
        )
    return f"pid {pid} may not be traced ({error.strerror}); run as its user or as root (CAP_SYS_PTRACE)"


def main(channel_fd: int, pid: int, command: list[str]) -> None:
    """Trace process `pid`, or start `command` if that is 0, until it ends or the recorder goes."""
    os.set_inheritable(channel_fd, False)
    channel = socket.socket(fileno=channel_fd)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _ignore)
    for sig in _TERMINAL_SIGNALS:  # what a terminal sends to all is for the target and the recorder
        if signal.getsignal(sig) is not signal.SIG_IGN:  # a handler, as exec resets it for the target
            signal.signal(sig, _ignore)
    tracer = _Tracer(channel, pid, wake)
    try:
        if command:
            tracer.launch(command)
        else:
            tracer.seize()
            tracer.share_memory()
            tracer.follow()
    except Ended:
        _last_word(tracer, "over")
    except RecordError as error:
        _last_word(tracer, "error", kind="missing" if isinstance(error, MissingPieceError) else "target", text=str(error))
    except _Left:
        pass


def _last_word(tracer: _Tracer, event: str, **values: Any) -> None:
    with contextlib.suppress(_Left):
        tracer.tell(event, **values)


def _ignore(*_: Any) -> None:
    """Do nothing; unlike SIG_IGN it is not inherited by the target."""
