"""The guest program of the recordings, as the list of accesses that it makes.

The payload lies in slot 30: code in its first page, the command list in the second, the stack in the last. With
``mode=long`` slot 31 holds its page tables, an identity map of 4 GiB. A guest op writes a list of ranges to the command
page; the program reads one, makes its accesses page by page, writes the result back, and halts at the end mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from spte.access import EXEC, READ, WRITE
from spte.platform import PAGE_SIZE

STRING_IO = 255  # not an access: KVM emulates `rep insb` here

CODE, COMMANDS, STACK = 0xC0000, 0xC0001, 0xC000F
CODE_SLOT, TABLE_SLOT = 30, 31
CODE_PAGES, TABLE_PAGES = 16, 256
PML4, PDPT, PD, PT = 0xD0000, 0xD0001, 0xD0002, 0xD0006
PT_LIMIT = 0x4000  # with guest_page=4k, gfns below it are mapped through a PT
GPTE_LINK, GPTE_A, GPTE_D, GPTE_LARGE = 7, 1 << 5, 1 << 6, 1 << 7  # P W U, accessed, dirty, PS
HIDDEN = (0xC0000, 0xE0000)  # gfns that a recording leaves out of leafs and tables

COMMAND_BYTES = 32
COMMAND_LIMIT = (STACK - COMMANDS) * PAGE_SIZE // COMMAND_BYTES - 1
INSB_BYTES = 16

# What KVM does when it has to emulate the instruction of an access.
PLAIN, LOAD, STORE, READ_MODIFY_WRITE, COMPARE_EXCHANGE, FETCH, LAST_PIECE = range(7)
ACCESS_BYTES = 4

ACCESS = np.dtype([
    ("gfn", np.int64), ("kind", np.uint8), ("insn", np.int64), ("verb", np.uint8), ("gpa", np.int64),
    ("length", np.int64), ("entry", np.int64), ("walk", np.bool_),
])  # fmt: skip
Accesses = npt.NDArray[Any]  # structured, dtype ACCESS


@dataclass(frozen=True, slots=True)
class Command:
    """One range of a guest op."""

    op: str
    first: int
    count: int
    off: int


class Instruction(NamedTuple):
    """One instruction a page: how KVM would emulate it, its accesses in order, and how many bytes they span."""

    verb: int
    kinds: tuple[int, ...]
    length: int = ACCESS_BYTES


_LOAD, _STORE = Instruction(LOAD, (READ,)), Instruction(STORE, (WRITE,))
_PUSH = Instruction(PLAIN, (WRITE,))
_INSTRUCTIONS = {
    "guest_read": (_LOAD,),
    "guest_write": (_STORE,),
    "guest_read_write": (_LOAD, _STORE),
    "guest_exec": (_PUSH, Instruction(FETCH, (EXEC,), 1)),
    "guest_insb": (_PUSH,),
}


def identity_map(words: Callable[[int], npt.NDArray[np.uint64]], *, small_pages: bool, used: bool) -> None:
    """Write the payload's page tables: 4 GiB, address = gpa, by 2 MiB pages or, `small_pages`, the first 64 MiB by 4 KiB pages.

    Parameters
    ----------
    words : callable
        Returns the 512 words of a gfn, to be filled.
    small_pages : bool
        ``guest_page=4k``.
    used : bool
        A is set everywhere and D in what maps a page.
    """
    link = GPTE_LINK | (GPTE_A if used else 0)
    leaf = link | (GPTE_D if used else 0)
    words(PML4)[0] = PDPT << 12 | link
    for gib in range(4):
        words(PDPT)[gib] = (PD + gib) << 12 | link
        words(PD + gib)[:] = ((np.arange(512, dtype=np.uint64) + np.uint64(gib * 512)) << np.uint64(21)) | np.uint64(leaf | GPTE_LARGE)
    for table in range(PT_LIMIT // 512 if small_pages else 0):
        words(PD)[table] = (PT + table) << 12 | link
        words(PT + table)[:] = ((np.arange(512, dtype=np.uint64) + np.uint64(table * 512)) << np.uint64(12)) | np.uint64(leaf)


class Payload:
    """The accesses of guest ops under one vendor and guest mode.

    Parameters
    ----------
    locked_reads_first : bool
        A locked instruction on a page without SPTE faults as a read first (AMD); else as a write (Intel).
    mode : str
        ``"flat"`` or ``"long"``.
    small_pages : bool
        ``guest_page=4k``: gfns below 0x4000 are mapped through a PT.
    walk_kind : int or None
        How the CPU accesses guest page tables: WRITE, or READ on EPT without A/D bits; None: KVM walks them.
    code, stack : int
        Pages where the program lies and where it pushes, gfns.
    """

    def __init__(
        self, *, locked_reads_first: bool, mode: str, small_pages: bool, walk_kind: int | None, code: int = CODE, stack: int = STACK
    ) -> None:
        kinds = (READ, WRITE) if locked_reads_first else (WRITE,)
        increment, exchange = Instruction(READ_MODIFY_WRITE, kinds), Instruction(COMPARE_EXCHANGE, kinds)
        self._instructions = {
            **_INSTRUCTIONS, "guest_rmw": (increment, _LOAD), "guest_cmpxchg_fail": (_PUSH, exchange),
        }  # fmt: skip
        self._walks = mode == "long" and walk_kind is not None
        self._small_pages = small_pages
        self._walk_kind = WRITE if walk_kind is None else walk_kind
        self._code, self._stack = code, stack

    def _columns(self, pages: npt.NDArray[np.int64], kind: int) -> tuple[list[npt.NDArray[np.int64]], list[int]]:
        """Return gfns, one array a step, and kinds of one access to each of `pages`: the walk, then the page last."""
        if not self._walks:
            return [pages], [kind]
        pd = PD + (pages >> 18)
        walk = [np.full_like(pages, PML4), np.full_like(pages, PDPT), pd]
        if self._small_pages:
            walk.append(np.where(pages < PT_LIMIT, PT + (pages >> 9), pd))  # above it the PD is the last step
        return [*walk, pages], [self._walk_kind] * len(walk) + [kind]

    def single(self, gfn: int, kind: int, entry: int, insn: int) -> Accesses:
        """Return one access of the payload to its own page `gfn`."""
        columns, kinds = self._columns(np.array([gfn], np.int64), kind)
        out = np.zeros(len(kinds), ACCESS)
        out["gfn"] = np.concatenate(columns)
        out["kind"] = kinds
        out["walk"][:-1] = True
        out["insn"] = insn
        out["entry"] = entry
        return out

    def refetch(self) -> Accesses:
        """Return the fetch that a re-entry makes before the interrupted instruction; its `insn` is -1."""
        return self.single(self._code, EXEC, -1, -1)

    def pages(self, command: Command, entry: int) -> Accesses:
        """Return the accesses of all pages of `command`: the same instructions for each."""
        pages = np.arange(command.first, command.first + command.count, dtype=np.int64)
        columns: list[npt.NDArray[np.int64]] = []
        rows: list[tuple[int, bool, int, int, int]] = []  # kind, walk, instruction, verb, length
        instructions = self._instructions[command.op]
        for number, instruction in enumerate(instructions):
            own = instruction.verb != PLAIN
            crosses = own and command.off + instruction.length > PAGE_SIZE
            for kind in instruction.kinds:
                for target in (pages, pages + 1)[: 2 if crosses else 1]:
                    gfns, kinds = self._columns(target if own else np.full_like(pages, self._stack), kind)
                    columns += gfns
                    last = len(kinds) - 1
                    rows += [(k, n < last, number, instruction.verb, instruction.length) for n, k in enumerate(kinds)]
        out = np.zeros((len(pages), len(rows)), ACCESS)
        out["gfn"] = np.stack(columns, axis=1) if len(pages) else 0
        for name, values in zip(("kind", "walk", "insn", "verb", "length"), zip(*rows, strict=True), strict=True):
            out[name] = values
        out["insn"] += (np.arange(len(pages)) * len(instructions))[:, None]
        out["gpa"] = (pages * PAGE_SIZE + command.off)[:, None]
        out["entry"] = entry
        if command.op == "guest_insb":
            return self._with_string_io(out, command, entry)
        return out.reshape(-1)

    def _with_string_io(self, pushes: Accesses, command: Command, entry: int) -> Accesses:
        """Return `pushes`, one row a page, each followed by its string IO: one piece a page that it touches."""
        fetch = self.refetch()
        pieces: list[Accesses] = []
        insn = 0
        for push in pushes:
            push["insn"] = insn
            pieces.append(push)
            gpa, rest = int(push["gpa"][0]), INSB_BYTES
            while rest:
                insn += 1
                length = min(rest, PAGE_SIZE - gpa % PAGE_SIZE)
                io = np.zeros(1, ACCESS)
                io["kind"], io["insn"], io["gpa"], io["length"], io["entry"] = STRING_IO, insn, gpa, length, entry
                io["verb"] = LAST_PIECE if length == rest else PLAIN
                again = fetch.copy()
                again["insn"], again["entry"] = insn, entry
                pieces += [again, io]
                gpa += length
                rest -= length
            insn += 1
        return np.concatenate(pieces) if pieces else pushes.reshape(-1)

    def program(self, commands: list[Command | None], entry: int = 0) -> Accesses:
        """Return all accesses from the read of command `entry` to the read of the end mark (None) behind it."""
        pieces: list[Accesses] = []
        insn = 0
        for number in range(entry, len(commands)):
            page = COMMANDS + number * COMMAND_BYTES // PAGE_SIZE
            command = commands[number]
            pieces.append(self.single(page, READ, number, insn))
            if command is None:
                break
            body = self.pages(command, number)
            body["insn"] += insn + 1
            insn = int(body["insn"][-1]) + 1 if body.size else insn + 1
            pieces.append(body)
            pieces.append(self.single(page, WRITE, number, insn))
            insn += 1
        return np.concatenate(pieces)
