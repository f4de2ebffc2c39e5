"""ptrace(2) on one thread: attach without stopping it, wait for its stops, read and write its registers.

A binding of our own, over ctypes: python-ptrace, the one on PyPI with users, is under the GPL and had its last release in 2024.
Nothing but the standard library is imported here: the tracer is a process of its own and must start fast.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct

SEIZE, INTERRUPT, LISTEN, CONT, SYSCALL = 0x4206, 0x4207, 0x4208, 7, 24
SETOPTIONS, GETREGSET, SETREGSET, GETSIGMASK, SETSIGMASK = 0x4200, 0x4204, 0x4205, 0x420A, 0x420B
GET_RSEQ_CONFIGURATION, GET_SYSCALL_USER_DISPATCH_CONFIG = 0x420F, 0x4210
O_TRACESYSGOOD, O_TRACEEXEC, O_TRACEEXIT, O_SUSPEND_SECCOMP = 1, 1 << 4, 1 << 6, 1 << 21
EVENT_EXEC, EVENT_EXIT, EVENT_STOP = 4, 6, 128
NT_PRSTATUS = 1
WALL = 0x40000000
"""waitpid: any child or tracee, however it was cloned."""
OPTIONS = O_TRACESYSGOOD | O_TRACEEXEC | O_TRACEEXIT
"""Not O_EXITKILL: the target outlives its tracer. Not O_TRACEFORK and its kin: children are left alone."""

SYSCALL_STOP = signal.SIGTRAP | 0x80
GROUP_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs",
    "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
"""Order of `struct user_regs_struct` on x86-64."""
Registers = dict[str, int]
_REGS = struct.Struct(f"<{len(REGISTERS)}Q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.syscall.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def request(what: int, pid: int, addr: int = 0, data: int = 0) -> int:
    """Perform one ptrace request; return its result.

    Raises
    ------
    OSError
        With ptrace's errno; ESRCH also where the thread is not in a stop.
    """
    result = int(_libc.ptrace(what, pid, addr, data))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def syscall(number: int, *args: int) -> int:
    """Perform a system call that Python does not have; return its result.

    Raises
    ------
    OSError
        With the call's errno.
    """
    result = int(_libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args)))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def event_of(status: int) -> int:
    """Return the PTRACE_EVENT of a wait status, 0 for a stop without one."""
    return status >> 16


def get_registers(pid: int) -> Registers | None:
    """Return the registers of the stopped thread `pid`; None if it runs 32-bit code."""
    buffer = ctypes.create_string_buffer(_REGS.size)
    iovec = _Iovec(ctypes.addressof(buffer), len(buffer))
    request(GETREGSET, pid, NT_PRSTATUS, ctypes.addressof(iovec))
    if iovec.len != _REGS.size:
        return None
    return dict(zip(REGISTERS, _REGS.unpack(buffer.raw), strict=True))


def set_registers(pid: int, registers: Registers) -> None:
    """Give the stopped thread `pid` these registers."""
    buffer = ctypes.create_string_buffer(_REGS.pack(*(registers[name] for name in REGISTERS)), _REGS.size)
    iovec = _Iovec(ctypes.addressof(buffer), len(buffer))
    request(SETREGSET, pid, NT_PRSTATUS, ctypes.addressof(iovec))


def get_sigmask(pid: int) -> int:
    """Return the blocked signals of the stopped thread `pid`, bit n - 1 for signal n; a temporary mask (ppoll) is not it."""
    mask = ctypes.c_uint64()
    request(GETSIGMASK, pid, 8, ctypes.addressof(mask))
    return mask.value


def set_sigmask(pid: int, mask: int) -> None:
    """Block just the signals of `mask` in the stopped thread `pid`."""
    request(SETSIGMASK, pid, 8, ctypes.addressof(ctypes.c_uint64(mask)))


def get_rseq_address(pid: int) -> int:
    """Return where the stopped thread `pid` registered its `struct rseq`; 0 if it did not or the kernel can not say."""
    configuration = ctypes.create_string_buffer(24)
    try:
        request(GET_RSEQ_CONFIGURATION, pid, len(configuration), ctypes.addressof(configuration))
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EINVAL):
            raise
        return 0
    return int.from_bytes(configuration.raw[:8], "little")


def dispatches_syscalls(pid: int) -> bool:
    """Return whether the stopped thread `pid` has its system calls sent to itself as signals, as Wine does."""
    configuration = ctypes.create_string_buffer(32)
    try:
        request(GET_SYSCALL_USER_DISPATCH_CONFIG, pid, len(configuration), ctypes.addressof(configuration))
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EINVAL):
            raise
        return False
    return int.from_bytes(configuration.raw[:8], "little") != 0
