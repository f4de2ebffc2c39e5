"""`spte replay`: perform a recording's ops on the model, and write down what the model did in the same format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spte.arrays.tables import PAE_ROOT
from spte.bits import ROLE_INVALID
from spte.errors import KvmError
from spte.observe import listing
from spte.observe.stats import RECORDED_STATS, stat_files
from spte.platform import EPT
from spte.policy import Policy
from spte.recording.file import Recording
from spte.recording.ops import OPS, RecordingError, short, unknown_args, with_defaults
from spte.replay.guest import UnsupportedOp
from spte.replay.machine import Machine
from spte.replay.nested import NestedGuest
from spte.replay.ops import HANDLERS
from spte.replay.payload import CODE_SLOT, HIDDEN, TABLE_SLOT

COUNTS = {"flush_all": "flushes", "fault": "ept_violations", "mmio_fault": "ept_misconfigs", "fast_fixed": "faults_fast"}
EXIT_REASONS = {"EPT_VIOLATION": "ept_violations", "EPT_MISCONFIG": "ept_misconfigs", "PML_FULL": "pml_full"}

class Replay:
    """The model going through one recording.

    Parameters
    ----------
    header : dict
        First line of the recording: config, kernel and module parameters choose the model.
    events : bool
        Write the model's tracepoints into the records, in their kernel names.
    policy : Policy, optional
        What the kernel does, in place of what the header's kernel does.

    Raises
    ------
    RecordingError
        A config or kernel that the model does not have.
    """

    def __init__(self, header: Mapping[str, Any], *, events: bool = False, policy: Policy | None = None) -> None:
        self.machine = Machine(header, events=events, policy=policy)
        self._events = events
        self._traced = True
        self._stats: dict[str, dict[str, int]] = {}
        self._slots: Any = None
        self._mmu: Any = None
        self._counters: dict[str, int] = {}
        self._nested: Any = None

    def step(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Perform the op of `record` from its inputs; returns the record of what the model did.

        Raises
        ------
        UnsupportedOp
            The model does not perform this op; the replay can not go on.
        RecordingError
            The op refers to something that the recording did not make.
        """
        op, args = record["op"], record["args"]
        if op not in OPS:
            raise UnsupportedOp(f"op {short(op)} is not known")
        for name in unknown_args(op, args):
            raise UnsupportedOp(f"argument {short(name)} of {op} is not known")
        out: dict[str, Any] = {"i": record["i"], "op": op, "args": args}
        if op == "new_vm":
            self._stats, self._slots, self._mmu, self._counters, self._nested = {}, None, None, {}, None
        if op not in HANDLERS:
            raise UnsupportedOp(f"op {op} has no model yet")
        given = with_defaults(op, args)
        if op == "set":
            self._traced = bool(given["trace"])
        try:
            out |= HANDLERS[op](self.machine, given, record)
        except KvmError as error:
            raise RecordingError(f"op {record['i']}, {op}, can not be performed: {error}") from None
        if "yields" in record:
            out["yields"] = record["yields"]
            self._yield(record["yields"])
        if self.machine.has_vm:
            self._observe(out, new=op == "new_vm")
        return out

    def _yield(self, times: int) -> None:
        """Let walks of the op have been rescheduled so often: each time KVM flushes what it has changed so far, and goes on."""
        for _ in range(times):
            self.machine.vm.mmu.flush()

    def _observe(self, out: dict[str, Any], *, new: bool) -> None:
        """Add to `out` what changed in statistics, hardware log, slots and tables."""
        self._observe_stats(out, new=new)
        vm = self.machine.vm
        if self._events:
            out["events"] = out.get("events", []) + vm.drain_events()
        if self.machine.intel:
            hw = _run_lengths(vm.drain_hw(), self.machine.guest.walked)
            if hw:
                out["hw"] = hw
        slots = [s for s in vm.slots() if s["id"] not in (CODE_SLOT, TABLE_SLOT) or s["flags"]]
        if slots != self._slots:
            out["slots"] = self._slots = slots
        nested = isinstance(self.machine.guest, NestedGuest)
        mmu = vm.roots(hide=HIDDEN) if nested else [self._mmu_entry(vcpu) for vcpu in range(len(vm.vcpus))]
        if mmu != self._mmu:
            out["mmu"] = self._mmu = mmu
        if nested and (state := self._nested_state()) != self._nested:
            out["nested"] = self._nested = state

    def _observe_stats(self, out: dict[str, Any], *, new: bool) -> None:
        vm = self.machine.vm
        changed: dict[str, dict[str, int]] = {}
        for who, values in stat_files(vm.mmu.tables, vm.kvm.vcpu_arrays).items():
            before = self._stats.get(who, {})
            kept = {name: values.get(name, 0) for name in RECORDED_STATS["vm" if who == "vm" else "vcpu"]}
            different = {name: value for name, value in sorted(kept.items()) if value != before.get(name, 0)}
            if different:
                changed[who] = different
            self._stats[who] = kept
        counters = self.machine.counters()
        if self.machine.policy.binary_stats:
            if changed:
                out["stats"] = changed
        elif self._traced and not new:
            counts = {name: counters[key] - self._counters.get(key, 0) for name, key in COUNTS.items()}
            if self.machine.intel:  # there a fault counts whatever its error code, and a misconfiguration is none
                mmio = counts.pop("mmio_fault")
                counts["fault"] += mmio if self.machine.platform.paging != EPT else 0
            if counts := {name: count for name, count in counts.items() if count}:
                out["counts"] = counts
        reasons = {name: counters[key] - self._counters.get(key, 0) for name, key in EXIT_REASONS.items()}
        reasons["IO_INSTRUCTION"] = counters["io_exits"] - self._counters.get("io_exits", 0)
        self._counters = counters
        if self.machine.platform.paging != EPT:
            reasons = {"IO_INSTRUCTION": reasons["IO_INSTRUCTION"]}
        reasons = {name: count for name, count in reasons.items() if count}
        if reasons and self.machine.intel and self._traced and not new:
            out["exit_reasons"] = reasons

    def _nested_state(self) -> dict[str, Any]:
        vm = self.machine.vm
        state = {"in_l2": [int(v.in_l2) for v in vm.vcpus], "rmaps": int(vm.mmu.shadow_root_allocated)}
        if not self.machine.intel:
            return state
        return state | {
            "logging_slots": vm.nr_memslots_dirty_logging, "pml01": [int(v.pml01) for v in vm.vcpus],
            "pml02": [int(v.nested.ran and v.pml01 and vm.policy.pml_in_l2) for v in vm.vcpus],
            "deferred": [int(v.nested.update_deferred) for v in vm.vcpus],
        }  # fmt: skip

    def _mmu_entry(self, vcpu: int) -> dict[str, Any]:
        vm = self.machine.vm
        roots = [int(each.arrays.vcpu[0].root) for each in vm.vcpus]
        root = roots[vcpu]
        role, level = int(vm.mmu.tables.pages[root].role), int(vm.mmu.tables.pages[root].level)
        bits, role_of = vm.kvm.bits, vm.kvm.role_of(vcpu, root)
        entry: dict[str, Any] = {"vcpu": vcpu, "root_level": level, "role": f"{role_of(root) & ~bits.role_invalid:x}"}
        if root in roots[:vcpu]:
            return {**entry, "root": f"same as vcpu {roots.index(root)}"}
        entry["root_invalid"] = -1 if vm.mmu.tables.pages[root].shadow == PAE_ROOT else int(role & ROLE_INVALID != 0)
        walked = listing.walk(vm.mmu.tables, root, HIDDEN)
        entry["leafs"], entry["tables"] = listing.leafs(walked, bits), listing.tables(vm.mmu.tables, walked, role_of)
        other = listing.other(walked, bits)
        if other:
            entry["other"] = other
        return entry


def _run_lengths(log: list[Any], walked: frozenset[int]) -> list[list[Any]]:
    """Return a hardware log with entries of following gfns, equal level and walk, as runs."""
    runs: list[list[Any]] = []
    for item in log:
        if item[0] != "pml":
            runs.append(list(item))
            continue
        _, gfn, index, level, accessed = item
        walk = "+".join(([accessed, ""] if accessed else []) + ["walk"]) if gfn in walked else accessed
        last = runs[-1] if runs and runs[-1][0] == "pml" else None
        if last and last[1] + last[2] == gfn and last[3] - last[2] == index and last[4:] == [level, walk]:
            last[2] += 1
        else:
            runs.append(["pml", gfn, 1, index, level, walk])
    return runs


def replay(recording: Recording, *, events: bool = False, policy: Policy | None = None) -> Iterator[dict[str, Any]]:
    """Yield the model's record of each op of `recording`, in order.

    Parameters
    ----------
    recording : Recording
        The ops.
    events : bool
        Write the model's tracepoints into the records.
    policy : Policy, optional
        What the kernel does, in place of what the header's kernel does.

    Raises
    ------
    UnsupportedOp
        The model does not perform an op; records before it were given.
    RecordingError
        The recording can not be performed as written.
    """
    run = Replay(recording.header, events=events, policy=policy)
    try:
        for record in recording.records:
            yield run.step(record)
    finally:
        run.machine.close()
