"""Guest ops of a replay: the payload's accesses through a vCPU, and KVM's emulation where a page has no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from spte.access import WRITE
from spte.replay.payload import (
    COMPARE_EXCHANGE,
    FETCH,
    LAST_PIECE,
    LOAD,
    READ_MODIFY_WRITE,
    STORE,
    STRING_IO,
    Accesses,
    Command,
    Payload,
)

HALT = {"exit": "hlt"}
RING_FULL = {"exit": "dirty_ring_full"}
MMIO_FRAGMENT = 8  # bytes of one KVM_EXIT_MMIO at most
IO_PORT = 16
SHOWN_EXITS = 12  # a recording lists more than that as six, a count, six

Exits = list[dict[str, Any]]


class UnsupportedOp(Exception):  # noqa: N818 - it is a finding about the model, not an error of the caller
    """An op, or a case of one, that the model does not perform."""


class Memory(NamedTuple):
    """What the emulator asks of the VM, by gfn of the vCPU's address space."""

    readable: Callable[[int], bool]
    writable: Callable[[int], bool]
    write: Callable[[int, int], None]  # (vcpu, gfn): KVM stores to guest memory


class Interrupted(NamedTuple):
    """Where a vCPU stopped: the rest of its range, and the command that it reads next (None: there is none)."""

    rest: Accesses
    entry: int | None


class Guest:
    """The guest of one VM: the command page, and for each vCPU how far it got.

    Parameters
    ----------
    vcpus : sequence of spte.Vcpu
        The VM's vCPUs.
    payload : Payload
        What the guest program does for an op.
    memory : Memory
        How KVM reaches guest memory when it emulates.
    retries : bool
        KVM lets a locked instruction on a READONLY page fault once more before it emulates.

    `io_exits` counts the VM exits of string IO so far; `walked` are the table pages that the last run's first write to
    was a page-table walk's.
    """

    def __init__(self, vcpus: Any, payload: Payload, memory: Memory, *, retries: bool) -> None:
        self._retries = retries
        self._vcpus = vcpus
        self._payload = payload
        self._memory = memory
        self._commands: list[Command | None] = [None]
        self._interrupted: dict[int, Interrupted] = {}
        self.io_exits = 0
        self.walked: frozenset[int] = frozenset()

    def start(self, vcpu: int, commands: list[Command]) -> Exits:
        """Write `commands` to the command page and run `vcpu` from the program's start; returns its exits."""
        self._commands[: len(commands) + 1] = [*commands, None]
        self._interrupted.pop(vcpu, None)
        return self._run(vcpu, self._payload.program(self._commands))

    def resume(self, vcpu: int) -> Exits:
        """Continue `vcpu` where it stopped; a list of commands that was finished starts again."""
        stop = self._interrupted.pop(vcpu, None)
        if stop is None:
            return self._run(vcpu, self._payload.program(self._commands))
        if stop.entry is None:
            return self._run(vcpu, stop.rest)
        more = self._payload.program(self._commands, stop.entry)
        more["insn"] += int(stop.rest["insn"][-1]) + 1
        return self._run(vcpu, np.concatenate((stop.rest, more)))

    def _run(self, vcpu: int, accesses: Accesses) -> Exits:
        program = np.concatenate((self._payload.refetch(), accesses))
        gfns, kinds = np.ascontiguousarray(program["gfn"]), np.ascontiguousarray(program["kind"])
        written = program[kinds == WRITE]
        _, first = np.unique(written["gfn"], return_index=True)
        self.walked = frozenset(written["gfn"][first[written["walk"][first]]].tolist())
        stops = [*np.flatnonzero(kinds == STRING_IO).tolist(), len(program)]
        exits: Exits = []
        at = 0
        for stop in stops:
            while at < stop:
                exit_ = self._vcpus[vcpu].run(gfns[at:stop], kinds[at:stop])
                if exit_ is None:
                    at = stop
                    continue
                at += exit_.index
                insn = program["insn"][at]
                if exit_.reason != "mmio":
                    self._interrupt(vcpu, program[np.searchsorted(program["insn"], insn, "left") :])
                    exits.append(RING_FULL if exit_.reason == "dirty_ring_full" else {"error": exit_.reason.upper()})
                    return elided(exits)
                if self._retries and program["verb"][at] == READ_MODIFY_WRITE and self._memory.readable(int(gfns[at])):
                    self._vcpus[vcpu].run(gfns[at : at + 1], kinds[at : at + 1])
                exits += self._emulate(vcpu, program[at])
                at = int(np.searchsorted(program["insn"], insn, "right"))
            if stop < len(program):
                exits += self._string_io(vcpu, program[stop])
                at = stop + 1
        return elided([*exits, HALT])

    def _interrupt(self, vcpu: int, rest: Accesses) -> None:
        rest = rest[rest["insn"] >= 0]  # the fetch of the re-entry is made anew
        entry = int(rest["entry"][0])
        after = None if self._commands[entry] is None else entry + 1
        self._interrupted[vcpu] = Interrupted(rest[rest["entry"] == entry].copy(), after)

    def _emulate(self, vcpu: int, access: Any) -> Exits:
        """Emulate the whole instruction of `access`, one that met a page without (writable) memory."""
        verb, gpa, length = (int(access[name]) for name in ("verb", "gpa", "length"))
        if verb not in (LOAD, STORE, READ_MODIFY_WRITE, COMPARE_EXCHANGE):
            what = "instruction fetch" if verb == FETCH else "access of the payload to its own pages"
            raise UnsupportedOp(f"{what} at gfn {int(access['gfn'])}, which has no memory slot")
        exits: Exits = []
        if verb != STORE:
            exits += self._pieces(vcpu, gpa, length, write=False)
        if verb != LOAD:
            exits += self._pieces(vcpu, gpa, length, write=True)
        return exits

    def _pieces(self, vcpu: int, gpa: int, length: int, *, write: bool) -> Exits:
        """Access `length` bytes as the emulator does, page by page; returns the MMIO exits of pages without memory."""
        exits: Exits = []
        end = gpa + length
        while gpa < end:
            page_end = min(end, (gpa | 4095) + 1)
            gfn = gpa >> 12
            if write and self._memory.writable(gfn):
                self._memory.write(vcpu, gfn)
            elif write or not self._memory.readable(gfn):
                exits += [
                    {"exit": "mmio", "gpa": at, "len": min(MMIO_FRAGMENT, page_end - at), "write": int(write)}
                    for at in range(gpa, page_end, MMIO_FRAGMENT)
                ]
            gpa = page_end
        return exits

    def _string_io(self, vcpu: int, io: Any) -> Exits:
        """One piece of `rep insb`: the port read, then KVM's store to guest memory."""
        gpa, length = int(io["gpa"]), int(io["length"])
        self.io_exits += 2 if io["verb"] == LAST_PIECE else 1  # the re-entry exits once more before rcx is found 0
        port = {"exit": "io", "in": 1, "port": IO_PORT, "size": 1, "count": length}
        return [port, *self._pieces(vcpu, gpa, length, write=True)]


def elided(exits: Exits) -> Exits:
    """Return `exits` as a recording lists them: a long list without its middle."""
    half = SHOWN_EXITS // 2
    if len(exits) <= SHOWN_EXITS:
        return exits
    return [*exits[:half], {"more": len(exits) - SHOWN_EXITS}, *exits[-half:]]

