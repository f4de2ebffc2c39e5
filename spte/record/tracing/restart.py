"""System calls that a look from outside would end with EINTR, performed once more instead.

The kernel restarts most calls that a stop interrupts. Some it does not (signal(7): epoll_wait and its kin), and a traced process is
also woken by signals that it ignores. No such end may show, as there was no signal for the target to handle.
"""

from __future__ import annotations

import errno
import re
import signal

from spte.record.tracing import ptrace

_EINTR = (1 << 64) - errno.EINTR
_RESTARTABLE = {
    43: "accept", 45: "recvfrom", 47: "recvmsg", 65: "semop", 128: "rt_sigtimedwait", 208: "io_getevents", 220: "semtimedop",
    232: "epoll_wait", 281: "epoll_pwait", 288: "accept4", 333: "io_pgetevents", 426: "io_uring_enter", 441: "epoll_pwait2",
}  # fmt: skip
"""x86-64 numbers of the calls that end with EINTR where they have done nothing yet; a timeout among them begins anew."""
_IGNORED_BY_DEFAULT = (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
_SYSCALL_BYTES = 2


def is_ignored(pid: int, sig: int) -> bool:
    """Return whether process `pid` ignores signal `sig`."""
    masks = _signal_masks(pid)
    return _has(masks["SigIgn"], sig) or (sig in _IGNORED_BY_DEFAULT and not _has(masks["SigCgt"], sig))


def has_signal(pid: int) -> bool:
    """Return whether a signal waits for the main thread of process `pid` that it does not block."""
    masks = _signal_masks(pid)
    return bool((masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"])


def restarted(registers: ptrace.Registers) -> ptrace.Registers:
    """Return `registers` so that an interrupted call begins once more; the same if there is none to restart."""
    if registers["rax"] != _EINTR or registers["orig_rax"] not in _RESTARTABLE:
        return registers
    return {**registers, "rax": registers["orig_rax"], "rip": registers["rip"] - _SYSCALL_BYTES}


def _has(mask: int, sig: int) -> bool:
    return bool(mask >> (sig - 1) & 1)


def _signal_masks(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        return {name: int(mask, 16) for name, mask in re.findall(r"^(S\w\w\w\w\w):\t([0-9a-f]{16})$", status.read(), re.MULTILINE)}
