"""The guest that makes a recording's accesses on /dev/kvm: flat segments, paging off or an identity map of 4 GiB.

The program lies where the recordings' has lain. It reads commands of 32 bytes from the page behind its code - routine, address, count -
calls the routine for each page, and halts at the end mark. Its code means the same in 32 and in 64 bits.

A backend without VMX or SVM may run natively only what the guest does in user mode under its own page tables, and emulate all else
instruction by instruction: kernel writes, which no SPTE sees. There the guest runs in user mode, and stores to a page without memory
where it would halt.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from spte.devkvm import abi
from spte.devkvm.device import HostMemory, HostVcpu, IoctlError, ioctl
from spte.platform import PAGE_SIZE
from spte.replay.guest import HALT, RING_FULL, Exits, UnsupportedOp, elided
from spte.replay.payload import CODE, CODE_PAGES, COMMAND_BYTES, COMMANDS, PML4, STACK, Command

BASE = CODE * PAGE_SIZE
STACK_TOP = STACK * PAGE_SIZE + 0xFC0
STORED = 0xC3C3  # what the guest stores: a page that was written may be called still, 0xc3 is `ret`
MMIO_BYTE, PORT_BYTE = b"\x77", b"\x5a"  # what a device answers
END_GPA = 0xE000_0000  # in no memslot; 32 bits
TIME_LIMIT = 20.0  # seconds for one run of a vCPU
RET = 0xC3
_HALT, _STORE_TO_EBP = bytes.fromhex("f49090"), bytes.fromhex("894500")

_LOOP = bytes.fromhex(
    "8b06"  # next:  mov eax, [esi]
    "85c0"  #        test eax, eax
    "741c"  #        jz halt
    "8b7e04"  #      mov edi, [esi + 4]
    "8b4e08"  #      mov ecx, [esi + 8]
    "e30c"  # page:  jecxz done
    "ffd0"  #        call eax
    "81c700100000"  # add edi, 4096
    "ffc9"  #        dec ecx
    "ebf2"  #        jmp page
    "89560c"  # done: mov [esi + 12], edx
    "83c620"  #      add esi, 32
    "ebde"  #        jmp next
    "f49090"  # halt: hlt, or in user mode mov [ebp], eax
    "be001000c0"  #  mov esi, 0xc0001000
    "ebd4"  #        jmp next
)
EXIT_ROUTINE = "cpuid"
"""A routine that is no op of a recording: an exit that KVM handles by itself, and the entry after it."""
_ROUTINES = {
    "guest_read": "8b17 c3",  # mov edx, [edi]; ret
    "guest_write": "891f c3",  # mov [edi], ebx; ret
    "guest_rmw": "f0810700010000 8b17 c3",  # lock add dword [edi], 256; mov edx, [edi]; ret
    "guest_cmpxchg_fail": "50 b8efbeadde f00fb11f 58 c3",  # push eax; mov eax, 0xdeadbeef; lock cmpxchg [edi], ebx; pop eax; ret
    "guest_read_write": "8b17 891f c3",  # mov edx, [edi]; mov [edi], ebx; ret
    "guest_exec": "ffd7 c3",  # call edi; ret
    EXIT_ROUTINE: "50 53 51 31c0 0fa2 59 5b 58 c3",  # push eax, ebx, ecx; xor eax, eax; cpuid; pop ecx, ebx, eax; ret
    "guest_insb": "51 57 b910000000 ba10000000 f36c 5f 59 c3",  # rep insb of 16 bytes from port 16
}
_ROUTINE_BYTES = 32
_ROUTINES_AT = 64
_CR0_PE, _CR0_PG, _CR4_PAE, _EFER_LME_LMA = 1, 1 << 31, 1 << 5, 0x500


def program(*, user: bool) -> bytes:
    """Return the guest's code, for the first page; `user`: it can not halt."""
    code = bytearray(_ROUTINES_AT + _ROUTINE_BYTES * len(_ROUTINES))
    code[: len(_LOOP)] = _LOOP.replace(_HALT, _STORE_TO_EBP) if user else _LOOP
    for n, text in enumerate(_ROUTINES.values()):
        routine, at = bytes.fromhex(text), _ROUTINES_AT + n * _ROUTINE_BYTES
        code[at : at + len(routine)] = routine
    return bytes(code)


@contextlib.contextmanager
def _watchdog() -> Iterator[threading.Event]:
    """Let KVM_RUN end with EINTR after the time limit, and set the event; signals can be had in the main thread alone."""
    over = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield over
        return
    before = signal.signal(signal.SIGALRM, lambda *_: over.set())
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield over
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class HostGuest:
    """The guest of one VM; its calls are those of `spte.replay.guest.Guest`.

    Parameters
    ----------
    vcpus : sequence of HostVcpu
        The VM's vCPUs.
    code : HostMemory
        The memory of the payload's slot, where the program is written to.
    paging : bool
        The guest's paging is on, with the root table at its place.
    user : bool
        It runs in user mode, which takes `paging`; string I/O alone does not.
    """

    def __init__(self, vcpus: Sequence[HostVcpu], code: HostMemory, *, paging: bool, user: bool) -> None:
        self._vcpus, self._code, self._paging, self._user = vcpus, code, paging, user
        text = program(user=user)
        code.bytes[: len(text)] = np.frombuffer(text, np.uint8)

    def start(self, vcpu: int, commands: list[Command]) -> Exits:
        """Write `commands` to the command page and run `vcpu` from the program's start; returns its exits."""
        words = np.zeros((len(commands) + 1, COMMAND_BYTES // 4), np.uint32)
        for n, command in enumerate(commands):
            address = command.first * PAGE_SIZE + command.off
            if address + max(command.count, 1) * PAGE_SIZE > 1 << 32:
                raise UnsupportedOp(f"an access at gfn {command.first:#x}, beyond the 4 GiB that the guest reaches")
            pages = range(command.first, command.first + command.count)
            own = command.op != "guest_read" and max(pages.start, CODE) < min(pages.stop, CODE + CODE_PAGES)
            if own or (self._user and END_GPA // PAGE_SIZE in pages):
                raise UnsupportedOp(f"accesses of {command.count} pages from gfn {command.first:#x}: they are the guest's own")
            routine = BASE + _ROUTINES_AT + list(_ROUTINES).index(command.op) * _ROUTINE_BYTES
            words[n, :3] = routine, address, command.count
        at = (COMMANDS - CODE) * PAGE_SIZE
        self._code.bytes[at : at + words.nbytes] = words.view(np.uint8).reshape(-1)
        registers = [0] * 18
        registers[1], registers[4], registers[6], registers[7] = STORED, COMMANDS * PAGE_SIZE, STACK_TOP, END_GPA  # rbx, rsi, rsp, rbp
        registers[16], registers[17] = BASE, 2  # rip, rflags
        user = self._user and all(command.op != "guest_insb" for command in commands)
        _set_mode(self._vcpus[vcpu], paging=self._paging, privilege=3 if user else 0)
        ioctl(self._vcpus[vcpu].fd, abi.SET_REGS, abi.REGS.pack(*registers))
        return self.resume(vcpu)

    def resume(self, vcpu: int) -> Exits:
        """Continue `vcpu` where it stopped; a list of commands that was finished starts again."""
        exits: Exits = []
        with _watchdog() as over:
            while True:
                ended, more = _run(self._vcpus[vcpu])
                if over.is_set():
                    raise UnsupportedOp(f"the guest has not halted within {TIME_LIMIT:.0f} s")
                exits += more
                if ended:
                    return elided(exits)


def _run(vcpu: HostVcpu) -> tuple[bool, Exits]:
    """KVM_RUN once; returns whether the run is over, and its exit."""
    try:
        ioctl(vcpu.fd, abi.RUN)
    except IoctlError as error:
        return (False, []) if error.code == errno.EINTR else (True, [{"error": error.errno_name}])
    run = vcpu.run
    (reason,) = abi.EXIT_REASON.unpack_from(run)
    if reason == abi.EXIT_IO:
        direction, size, port, count, data = abi.IO.unpack_from(run, abi.EXIT_OFFSET)
        if direction == 0:
            run[data : data + size * count] = PORT_BYTE * (size * count)
        return False, [{"exit": "io", "in": int(direction == 0), "port": port, "size": size, "count": count}]
    if reason == abi.EXIT_MMIO:
        gpa, _, length, is_write = abi.MMIO.unpack_from(run, abi.EXIT_OFFSET)
        if gpa == END_GPA:
            return True, [HALT]
        if not is_write:
            run[abi.EXIT_OFFSET + 8 : abi.EXIT_OFFSET + 8 + length] = MMIO_BYTE * length
        return False, [{"exit": "mmio", "gpa": gpa, "len": length, "write": int(is_write)}]
    known = {abi.EXIT_HLT: HALT, abi.EXIT_DIRTY_RING_FULL: RING_FULL}
    return True, [known.get(reason, {"exit": abi.EXIT_NAMES.get(reason, str(reason))})]


def _set_mode(vcpu: HostVcpu, *, paging: bool, privilege: int) -> None:
    """Put the vCPU into 32-bit protected mode with flat segments; `paging`: into 64-bit mode, under four levels of page tables."""
    sregs = bytearray(abi.SREGS_BYTES)
    ioctl(vcpu.fd, abi.GET_SREGS, sregs)
    for n in range(6):
        code, long = n == 0, n == 0 and paging
        selector, kind = (8 if code else 16) | privilege, 0xB if code else 3
        abi.SEGMENT.pack_into(
            sregs, n * abi.SEGMENT.size, 0, 0xFFFF_FFFF, selector, kind, 1, privilege, int(not long), 1, int(long), 1, 0, 0, 0
        )
    cr0, cr2, cr3, cr4, cr8, efer = abi.CONTROL.unpack_from(sregs, abi.CONTROL_OFFSET)
    if paging:
        cr0, cr3, cr4, efer = cr0 | _CR0_PG, PML4 * PAGE_SIZE, cr4 | _CR4_PAE, efer | _EFER_LME_LMA
    abi.CONTROL.pack_into(sregs, abi.CONTROL_OFFSET, cr0 | _CR0_PE, cr2, cr3, cr4, cr8, efer)
    ioctl(vcpu.fd, abi.SET_SREGS, bytes(sregs))
