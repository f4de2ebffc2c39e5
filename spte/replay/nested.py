"""Ops of a replay whose guest runs a guest: what L1 and L2 of the payload access, and how L1 handles L2's exits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from spte.access import EXEC, READ, RWX, WRITE
from spte.exits import Exit
from spte.guest_tables import FRAME
from spte.recording.ops import RecordingError
from spte.recording.seq import Step
from spte.replay.guest import HALT, RING_FULL, Exits, Guest, Memory, UnsupportedOp, elided
from spte.replay.payload import CODE, STRING_IO, Accesses, Command, Payload
from spte.replay.payload_tables import L1Tables
from spte.vm.vcpu import VirtualCpu

VCPU_PAGES = 0x40  # the payload of each vCPU
PARAMS, VMX_REGION, CONTROL, L1_PML, COMMAND_LIST, L2_STACK, L1_STACK = 8, 10, 11, 14, 16, 59, 62  # its pages
VMCALL, VMMCALL, EPT_VIOLATION, NPF, PML_FULL = 18, 129, 48, 1024, 62
FROM_WALK, FROM_ADDRESS = 0x80, 0x180  # of a qualification: the access is a page walk's, or the one after it
PFERR_USER, PFERR_PRESENT, PFERR_FINAL, PFERR_WALK = 4, 1, 1 << 32, 1 << 33
STORES = 1 << 17  # pages of one change of L1's tables; keeps a forged count from running for hours
PFERR = {READ: 0, WRITE: 2, EXEC: 16}


class L2Setup(NamedTuple):
    """What L1 tells the CPU of its guest: arguments of ``new_vm``."""

    ept: bool
    ad: bool
    pml: bool


class NestedGuest(Guest):
    """The guest of one VM, each of whose vCPUs may run L2.

    Parameters
    ----------
    vcpus : sequence of VirtualCpu
        The VM's vCPUs.
    payloads : tuple of Payload
        What L1 and L2 do, by vCPU.
    memory : Memory
        How KVM reaches L1's memory when it emulates.
    tables : L1Tables or None
        L1's tables for L2; None: L2 runs on L1's addresses.
    setup : L2Setup
        How L1 runs L2.
    intel : bool
        VMX, else SVM.
    """

    def __init__(
        self, vcpus: Sequence[VirtualCpu], payloads: tuple[tuple[Payload, Payload], ...], memory: Memory, tables: L1Tables | None,
        setup: L2Setup, *, intel: bool,
    ) -> None:  # fmt: skip
        super().__init__(vcpus, payloads[0][0], memory, retries=False)
        self._payloads, self._tables, self._setup, self._intel = payloads, tables, setup, intel
        self._running: dict[int, Iterator[dict[str, Any]]] = {}
        self._queue: list[Accesses] = []
        self._insn = 0
        self._started: set[int] = set()
        self._root = dict.fromkeys(range(len(vcpus)), 0)
        self.l1_exits: list[list[Any]] = []
        self._exits: Exits = []

    # -- ops --------------------------------------------------------------------------------------------------------------

    def begin(self, vcpu: int) -> None:
        """Run `vcpu` for the first time: L1 sets up what VMX or SVM needs."""
        pages = (VMX_REGION, CONTROL) if self._intel else (CONTROL,)
        self._go(vcpu, self._start(vcpu, pages))

    def _start(self, vcpu: int, pages: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        self._touch(vcpu, (0, EXEC), (L1_STACK, WRITE), (PARAMS, READ), *((page, WRITE) for page in pages), (COMMAND_LIST, READ))
        yield from self._flush(vcpu)

    def run_steps(self, vcpu: int, steps: list[Step], off: int = 0) -> Exits:
        """Write `steps` to the command list and let `vcpu` do them; returns its exits, those of L2 to L1 are in `l1_exits`."""
        return self._go(vcpu, self._program(vcpu, steps, off))

    def resume(self, vcpu: int) -> Exits:
        """Run `vcpu` on from where it stopped."""
        stopped = self._running.pop(vcpu) if vcpu in self._running else self._program(vcpu, [], 0)
        return self._go(vcpu, stopped)

    def _go(self, vcpu: int, program: Iterator[dict[str, Any]]) -> Exits:
        self.l1_exits, self._exits = [], []
        stop = next(program, HALT)
        if stop is not HALT:
            self._running[vcpu] = program
        return elided([*self._exits, stop])

    def _program(self, vcpu: int, steps: list[Step], off: int) -> Iterator[dict[str, Any]]:
        self._queue, self._insn = [], 0
        self._touch(vcpu, (0, EXEC), (PARAMS, READ))
        for step in steps:
            self._touch(vcpu, (COMMAND_LIST, READ), (PARAMS, WRITE))
            if step.kind == "enter":
                yield from self._enter(vcpu)
            elif step.kind == "leave":
                yield from self._leave(vcpu)
            elif step.kind in ("protect", "remap"):
                yield from self._change_tables(vcpu, step)
            elif step.kind == "invept":
                yield from self._invept(vcpu)
            elif step.kind == "switch":
                if step.value and (self._tables is None or step.value >= len(self._tables.roots)):
                    raise RecordingError(f"root {step.value} of a sequence does not exist; new_vm made fewer")
                self._root[vcpu] = step.value
            else:
                yield from self._access(vcpu, step, off)
        self._touch(vcpu, (COMMAND_LIST, READ))
        yield from self._flush(vcpu)

    # -- L1 and L2 --------------------------------------------------------------------------------------------------------

    def _who(self, vcpu: int) -> Payload:
        return self._payloads[vcpu][self._vcpus[vcpu].in_l2]

    def _touch(self, vcpu: int, *pages: tuple[int, int]) -> None:
        """Queue accesses to the vCPU's own payload pages."""
        for page, kind in pages:
            self._queue.append(self._who(vcpu).single(CODE + vcpu * VCPU_PAGES + page, kind, 0, self._insn))
            self._insn += 1

    def _push(self, vcpu: int) -> None:
        self._touch(vcpu, (L2_STACK if self._vcpus[vcpu].in_l2 else L1_STACK, WRITE))

    def _access(self, vcpu: int, step: Step, off: int) -> Iterator[dict[str, Any]]:
        self._push(vcpu)
        for first, count in step.runs:
            if step.kind == "insb":
                yield from self._string_ios(vcpu, first, count, off)
                continue
            accesses = self._who(vcpu).pages(Command(f"guest_{step.kind}", first, count, off), 0)
            if len(accesses):
                accesses["insn"] += self._insn
                self._insn = int(accesses["insn"][-1]) + 1
                self._queue.append(accesses)
        self._touch(vcpu, (COMMAND_LIST, WRITE))

    def _string_ios(self, vcpu: int, first: int, count: int, off: int) -> Iterator[dict[str, Any]]:
        for access in self._who(vcpu).pages(Command("guest_insb", first, count, off), 0):
            if access["kind"] != STRING_IO:
                self._queue.append(access.reshape(1).copy())
                self._queue[-1]["insn"] = self._insn
                self._insn += 1
                continue
            yield from self._flush(vcpu)
            io = access.copy()
            if self._vcpus[vcpu].in_l2 and self._tables is not None:
                io["gpa"] = (self._tables.translate(int(io["gpa"]) >> 12, self._root[vcpu]) << 12) | (int(io["gpa"]) & 0xFFF)
            self._exits += self._string_io(vcpu, io)

    def _enter(self, vcpu: int) -> Iterator[dict[str, Any]]:
        if self._vcpus[vcpu].in_l2:
            raise UnsupportedOp(f"vCPU {vcpu} enters L2 while it is there")
        if not self._intel:
            self._touch(vcpu, (CONTROL, WRITE))
        self._push(vcpu)
        yield from self._flush(vcpu)
        self._run_l2(vcpu)
        self._touch(vcpu, (0, EXEC))
        if vcpu not in self._started:
            self._started.add(vcpu)
            self._push(vcpu)
            self._touch(vcpu, (PARAMS, READ))

    def _run_l2(self, vcpu: int) -> None:
        base = CODE + vcpu * VCPU_PAGES
        ept = self._tables.address(self._root[vcpu]) if self._tables is not None else None
        self._vcpus[vcpu].enter_l2(
            ept, ad=self._setup.ad, pml=(base + L1_PML) << 12 if self._setup.pml else None,
            vmcb=None if self._intel else (base + CONTROL) << 12,
        )  # fmt: skip

    def _leave(self, vcpu: int) -> Iterator[dict[str, Any]]:
        if not self._vcpus[vcpu].in_l2:
            raise UnsupportedOp(f"vCPU {vcpu} leaves L2 while it is not there")
        yield from self._flush(vcpu)
        self.l1_exits.append([VMCALL if self._intel else VMMCALL, "0", "0"])
        self._vcpus[vcpu].leave_l2()
        self._back_in_l1(vcpu)

    def _back_in_l1(self, vcpu: int) -> None:
        self._touch(vcpu, (0, EXEC), (L1_STACK, WRITE), (PARAMS, WRITE))
        if not self._intel:
            self._touch(vcpu, (CONTROL, WRITE))

    def _change_tables(self, vcpu: int, step: Step) -> Iterator[dict[str, Any]]:
        if self._tables is None:
            raise RecordingError("a step on L1's tables for L2 stands in a VM that was made with l2_ept=0")
        if sum(count for _, count in step.runs) > STORES:
            raise RecordingError(f"a change of L1's tables has more than {STORES} pages; L1's memory has fewer entries")
        self._push(vcpu)
        for first, count in step.runs:
            for n in range(count):
                place, value, _ = self._tables.entry(first + n, self._root[vcpu])
                if not value:
                    raise UnsupportedOp(f"L1 changes its entry for page {first + n:#x}, which it has not mapped")
                moved = value & ~FRAME | (step.value + n) << 12
                value = moved if step.kind == "remap" else self._tables.recorded(value, step.value)
                if step.clears:
                    value = self._tables.unused(value, accessed=step.clears == "a")
                yield from self._store(vcpu, place, value)

    def _store(self, vcpu: int, gpa: int, value: int) -> Iterator[dict[str, Any]]:
        """Let the running guest store 8 bytes, the walk to them first."""
        walk = self._who(vcpu).single(gpa >> 12, WRITE, 0, self._insn)[:-1]
        if len(walk):
            self._queue.append(walk)
        yield from self._flush(vcpu, leave=False)
        while (stop := self._vcpus[vcpu].store(gpa, value, leave=False)) is not None:
            yield from self._stopped(vcpu, stop, None)

    def _invept(self, vcpu: int) -> Iterator[dict[str, Any]]:
        self._push(vcpu)
        if self._intel and self._tables is not None:
            yield from self._flush(vcpu)
            self._vcpus[vcpu].invept(self._tables.address(self._root[vcpu]))

    # -- running ----------------------------------------------------------------------------------------------------------

    def _flush(self, vcpu: int, *, leave: bool = True) -> Iterator[dict[str, Any]]:
        """Let the vCPU do what is queued; yields what ends the op before that is done."""
        if not self._queue and not leave:
            return
        program = np.concatenate(self._queue) if self._queue else self._who(vcpu).refetch()
        self._queue = []
        while True:
            self.walked = frozenset(program["gfn"][program["walk"]].tolist()) - frozenset(program["gfn"][~program["walk"]].tolist())
            gfns, kinds = np.ascontiguousarray(program["gfn"]), np.ascontiguousarray(program["kind"])
            stop = self._vcpus[vcpu].run(gfns, kinds, leave=leave)
            if stop is None:
                return
            insn = program["insn"][stop.index] if stop.index < len(program) else np.iinfo(np.int64).max
            rest = program[np.searchsorted(program["insn"], insn, "left") :]
            yield from self._stopped(vcpu, stop, program[stop.index] if stop.index < len(program) else None)
            program = np.concatenate((self._who(vcpu).refetch(), rest))
            program["insn"][: len(program) - len(rest)] = rest["insn"][0] if len(rest) else 0

    def _stopped(self, vcpu: int, stop: Exit, access: Any) -> Iterator[dict[str, Any]]:
        """Do what has to be done before the access can be tried again."""
        if stop.reason == "dirty_ring_full":
            yield RING_FULL
        elif stop.reason in ("ept_violation", "npf", "pml_full"):
            self.l1_exits.append(self._row(stop, access))
            yield from self._handle(vcpu, stop)
        elif stop.reason == "efault":
            yield {"error": "EFAULT"}
        else:
            raise UnsupportedOp(f"{stop.reason} at page {stop.gfn:#x} of a guest that runs a guest")

    def _row(self, stop: Exit, access: Any) -> list[Any]:
        """Return an exit to L1 as it is recorded: reason, qualification or error code, address."""
        if stop.reason == "pml_full":
            return [PML_FULL, "0", "ffff"]
        walk = access is not None and bool(access["walk"])
        if stop.reason == "ept_violation":
            qualification = int(stop.kind) | int(stop.allows) << 3 | (FROM_WALK if walk else FROM_ADDRESS)
            return [EPT_VIOLATION, f"{qualification:x}", f"{stop.gfn << 12:x}"]
        code = PFERR_USER | PFERR[stop.kind] | (PFERR_PRESENT if stop.allows else 0) | (PFERR_WALK if walk else PFERR_FINAL)
        return [NPF, f"{code:x}", f"{stop.gfn << 12:x}"]

    def _handle(self, vcpu: int, stop: Exit) -> Iterator[dict[str, Any]]:
        """Let L1 handle an exit of L2: grant everything in its own leaf, or empty its PML buffer; then L2 runs on."""
        assert self._tables is not None
        queue, insn, self._queue = self._queue, self._insn, []
        self._back_in_l1(vcpu)
        if stop.reason == "pml_full":
            self._vcpus[vcpu].l1_pml_index = 511
        else:
            pages, _, _ = self._tables.walk(stop.gfn, self._root[vcpu])
            for page in pages:
                self._queue.append(self._who(vcpu).single(page, READ, 0, self._insn))
                self._insn += 1
            place, value, _ = self._tables.entry(stop.gfn, self._root[vcpu])
            if not value or value & RWX == RWX:
                raise UnsupportedOp(f"L2 accesses page {stop.gfn:#x}, which L1's tables do not map")
            yield from self._store(vcpu, place, value | RWX)
        self._push(vcpu)
        yield from self._flush(vcpu)
        self._run_l2(vcpu)
        self._queue, self._insn = queue, insn


