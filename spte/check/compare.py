"""Two records of one op, one of real KVM and one of the model: what is in force after each, and where they differ.

A recording writes a statistic, the slots or the tables down only when they change, so a comparison needs the last
value of each. `InForce` keeps them for one side; `differences` looks at both sides after an op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from spte.check.compare_mmu import Root, Roots, root_differences, unknown_mmu_keys
from spte.check.difference import Difference, Json, first_in_runs
from spte.observe.stats import RECORDED_STATS
from spte.recording.ops import VCPU_LIMIT

INPUT = frozenset({"i", "op", "args", "hva_mod_1g", "hva_mod_2m", "thp_kb", "now"})
DIRECT = frozenset({
    "ret", "errno", "manual_ret", "manual_errno", "ring_ret", "ring_errno",
    "dirty", "bytes", "entries", "n", "left_gpa", "left_size", "pml_index", "log",
    *(f"init_ret{vcpu}" for vcpu in range(VCPU_LIMIT)),
})  # fmt: skip
IN_FORCE = frozenset({"slots", "kbitmap", "mmu", "stats", "nested"})
EACH_OP = frozenset({"exits", "exit_reasons", "hw"})
NOT_COMPARED = frozenset({"events", "vals", "mem"})
KNOWN = INPUT | DIRECT | IN_FORCE | EACH_OP | NOT_COMPARED | {"l1_exits"}

OTHER_STATS = frozenset({
    "tlb_flush", "mmu_cache_miss", "mmu_shadow_zapped", "mmu_pte_write", "max_mmu_rmap_size", "remote_tlb_flush", "mmu_unsync",
})  # fmt: skip

SLOT_KEYS = ("base_gfn", "npages", "flags", "disallow_l2", "disallow_l3", "kbitmap")
NESTED_KEYS = ("in_l2", "rmaps", "logging_slots", "pml01", "pml02", "deferred")
EXIT_KEYS = frozenset({"exit", "error", "more", "gpa", "len", "write", "in", "port", "size", "count"})
EXIT_REASONS = frozenset({"EPT_VIOLATION", "EPT_MISCONFIG", "PML_FULL", "IO_INSTRUCTION"})
CPU_REASONS = frozenset({"HLT", "EXCEPTION_NMI"})
# Not compared: L1's VMX instructions are its program, and what they do shows in `nested`, `l1_exits` and `mmu`; SVM's
# npf is pf_taken once more, and its io is in `exits`.
VMX_REASONS = frozenset({"VMLAUNCH", "VMRESUME", "VMCALL", "VMREAD", "VMWRITE", "VMPTRLD", "VMCLEAR", "INVEPT"})
SVM_REASONS = frozenset({"vmrun", "hypercall", "npf", "io", "hlt", "PF"})
KNOWN_REASONS = EXIT_REASONS | CPU_REASONS | VMX_REASONS | SVM_REASONS
HW_COMPARED = frozenset({"pml", "pml_full"})
HW_CPU = frozenset({
    "setA", "setD", "setA+setD", "setA+walk", "setD+walk", "setA+setD+walk", "ept_violation", "ept_misconfig",
})  # fmt: skip


@dataclass
class InForce:
    """What holds after the records given to `apply` so far.

    Parameters
    ----------
    stats : dict
        ``(who, name) -> value``; absent is 0.
    slots : dict
        ``(as, id) -> slot`` without those two keys.
    mmu : dict
        ``(vcpu, mmu, which) -> entry``, complete; the last two are empty where a vCPU has one root.
    nested : dict
        ``name -> value`` of what KVM keeps for a guest that runs a guest.
    """

    stats: dict[tuple[str, str], int] = field(default_factory=dict)
    slots: dict[tuple[int, int], dict[str, Json]] = field(default_factory=dict)
    mmu: dict[Root, dict[str, Json]] = field(default_factory=dict)
    nested: dict[str, Json] = field(default_factory=dict)
    _roots: Roots = field(default_factory=Roots)

    def apply(self, record: Mapping[str, Json]) -> list[str]:
        """Take over what `record` changes; returns the names of keys that no table of the format knows."""
        unknown = [key for key in record if key not in KNOWN]
        if record["op"] == "new_vm":
            self.stats.clear()
            self.slots.clear()
            self.mmu.clear()
            self.nested.clear()
            self._roots = Roots()
        unknown += self._apply_stats(record.get("stats", {}))
        if "slots" in record:
            self.slots = {(s["as"], s["id"]): {k: s.get(k) for k in SLOT_KEYS} for s in record["slots"]}
            unknown += [f"slots.{k}" for s in record["slots"] for k in s if k not in (*SLOT_KEYS, "as", "id")]
        for key, runs in record.get("kbitmap", {}).items():
            number = int(key) if key.isdecimal() else -1
            self.slots.setdefault((number >> 16, number & 0xFFFF), {})["kbitmap"] = runs
        if "mmu" in record:
            self.mmu = self._roots.complete(record["mmu"])
            unknown += [f"mmu.{k}" for m in record["mmu"] for k in unknown_mmu_keys(m)]
        self.nested |= record.get("nested", {})
        unknown += [f"nested.{k}" for k in record.get("nested", {}) if k not in NESTED_KEYS]
        unknown += [f"exits.{k}" for e in record.get("exits", ()) for k in e if k not in EXIT_KEYS]
        unknown += [f"exit_reasons.{k}" for k in record.get("exit_reasons", {}) if k not in KNOWN_REASONS]
        unknown += [f"hw.{h[0]}" for h in record.get("hw", ()) if h[0] not in HW_COMPARED | HW_CPU]
        return unknown

    def _apply_stats(self, stats: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
        for who, values in stats.items():
            is_vcpu = who[:4] == "vcpu" and who[4:].isdecimal()
            known = RECORDED_STATS["vm"] if who == "vm" else RECORDED_STATS["vcpu"] if is_vcpu else ()
            for name, value in values.items():
                if name in known:
                    self.stats[who, name] = value
                elif name not in OTHER_STATS and value:
                    yield f"stats.{who}.{name}"


def fields_of(expected: Mapping[str, Json], force: InForce) -> int:
    """Return how many values a comparison of this op looks at."""
    direct = sum(key in DIRECT for key in expected)
    slots = len(force.slots) * len(SLOT_KEYS)
    mmu = sum(len(entry) for entry in force.mmu.values())
    vcpus = len({root.vcpu for root in force.mmu})
    nested = len(force.nested) + 1 if force.nested else 0
    return direct + slots + mmu + nested + len(RECORDED_STATS["vm"]) + vcpus * len(RECORDED_STATS["vcpu"]) + len(EACH_OP)


def differences(
    expected: Mapping[str, Json], got: Mapping[str, Json], force: InForce, model: InForce, *, reasons: bool
) -> Iterator[Difference]:
    """Yield where the two sides differ after one op: its own results first, then what is in force.

    Parameters
    ----------
    expected, got : dict
        The op's record of each side.
    force, model : InForce
        What holds after it on each side.
    reasons : bool
        The recording lists VM exits by reason in this op.
    """
    for key in sorted(DIRECT & (expected.keys() | got.keys())):
        if key not in expected or key not in got or expected[key] != got[key]:
            yield from _value(key, expected.get(key), got.get(key), expected.get("op"))
    halted = [{"exit": "hlt"}]
    yield from _items("exits", expected.get("exits", halted), got.get("exits", halted))
    yield from _items("l1_exits", expected.get("l1_exits", []), got.get("l1_exits", []))
    yield from _items("hw", _hardware(expected), _hardware(got))
    if reasons:
        ours, theirs = got.get("exit_reasons", {}), expected.get("exit_reasons", {})
        for name in sorted(EXIT_REASONS):
            if ours.get(name, 0) != theirs.get(name, 0):
                yield Difference(f"exit_reasons.{name}", theirs.get(name, 0), ours.get(name, 0))
    for who, name in sorted(force.stats.keys() | model.stats.keys()):
        a, b = force.stats.get((who, name), 0), model.stats.get((who, name), 0)
        if a != b:
            yield Difference(f"stats.{who}.{name}", a, b)
    yield from _slots(force.slots, model.slots)
    for name in NESTED_KEYS:
        if force.nested.get(name) != model.nested.get(name):
            yield Difference(f"nested.{name}", force.nested.get(name), model.nested.get(name))
    yield from root_differences(force.mmu, model.mmu)


def _value(key: str, expected: Json, got: Json, op: str | None) -> Iterator[Difference]:
    if key not in ("dirty", "entries", "log") or not isinstance(expected, list) or not isinstance(got, list):
        yield Difference(key, expected, got)
    elif op == "l2_tables":
        where = first_in_runs(expected, got)
        if where is not None:
            yield Difference(key, where.expected, where.got, where.gfn, where.level)
    else:
        yield from _items(key, expected, got)


def _items(key: str, expected: Sequence[Json], got: Sequence[Json]) -> Iterator[Difference]:
    """Yield the first item at which two lists differ, and its number."""
    if expected == got:
        return
    for n in range(max(len(expected), len(got))):
        a, b = (side[n] if n < len(side) else None for side in (expected, got))
        if a != b:
            yield Difference(f"{key}[{n}]", a, b)
            return


def _hardware(record: Mapping[str, Json]) -> list[Json]:
    """Return what the CPU logged, one item an entry: run lengths undone."""
    items: list[Json] = []
    for item in record.get("hw", ()):
        if item[0] == "pml":
            _, gfn, count, index, level, walk = item
            items += [["pml", gfn + k, index - k, level, walk] for k in range(count)]
        elif item[0] in HW_COMPARED:
            items.append(item)
    return items


def _slots(expected: Mapping[tuple[int, int], Json], got: Mapping[tuple[int, int], Json]) -> Iterator[Difference]:
    for key in sorted(expected.keys() | got.keys()):
        a, b = expected.get(key), got.get(key)
        name = f"slots[{key[0] << 16 | key[1]}]"
        if a is None or b is None:
            yield Difference(name, a, b)
        elif a != b:
            for part in SLOT_KEYS:
                if a.get(part) != b.get(part):
                    yield _slot_part(f"{name}.{part}", part, a, b)


def _slot_part(name: str, part: str, a: Mapping[str, Json], b: Mapping[str, Json]) -> Difference:
    base, left, right = a.get("base_gfn"), a.get(part), b.get(part)
    if not isinstance(left, list) or not isinstance(right, list) or not isinstance(base, int):
        return Difference(name, left, right)
    if part == "kbitmap":
        bits = [[(1, first, count, "dirty") for first, count in side] for side in (left, right)]
        where = first_in_runs(bits[0], bits[1])
        return Difference(name, left, right, None if where is None else base + where.gfn, 1)
    level = int(part[-1])
    size = 9 * (level - 1)
    regions = [_consecutive(side) for side in (left, right)]
    where = first_in_runs(regions[0], regions[1])
    return Difference(name, left, right, None if where is None else ((base >> size) + where.gfn) << size, level)


def _consecutive(runs: Sequence[Json]) -> list[tuple[int, int, int, int]]:
    out, at = [], 0
    for value, count in runs:
        out.append((1, at, count, value))
        at += count
    return out
