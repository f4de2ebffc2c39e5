"""The ops of a recording: their arguments, defaults and bounds, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from spte.platform import PAGE_SIZE
from spte.recording.seq import parse_seq

INT64 = 1 << 63
UINT64 = 1 << 64
PAGE_LIMIT = 1 << 40  # 4 KiB pages that a 52-bit address reaches
GUEST_PAGES = 1 << 20  # the payload is 32-bit code or an identity map of 4 GiB
ACCESS_LIMIT = 1 << 24  # accesses of one op; keeps a forged count from filling the memory
BACKING_LIMIT = 1 << 42  # bytes, 4 TiB
VCPU_LIMIT = 64
ROOT_LIMIT = 16  # tables that L1 keeps for L2, of 5 pages and more each, in the 192 pages that its table slot leaves


class RecordingError(ValueError):
    """A file that is not a recording, or a recording that can not be performed as written."""


class Arg(NamedTuple):
    """What one argument of an op may be; `default` is taken when it is absent, `required` refuses that."""

    kind: str
    default: Any = None
    low: int = 0
    high: int = 0
    words: tuple[str, ...] = ()
    required: bool = False


def _int(default: int | None = None, low: int = 0, high: int = UINT64, *, required: bool = False) -> Arg:
    return Arg("int", default, low, high, (), required)


def _word(default: str | None, *words: str, required: bool = False) -> Arg:
    return Arg("word", default, words=words, required=required)


def _text(*, required: bool = True) -> Arg:
    return Arg("text", required=required)


def _runs(limit: int, total: int, *words: str, default: Any = None, required: bool = False) -> Arg:
    return Arg("runs", default, total, limit, words, required)


_VCPU = _int(0, 0, VCPU_LIMIT)
_SLOT = _int(0, 0, 1 << 32)
_ADDRESS = _int(0, -INT64, UINT64)
_FLAG = _int(0, 0, 2)
_PAGES = _runs(PAGE_LIMIT, BACKING_LIMIT >> 12, required=True)
_GUEST = {"vcpu": _VCPU, "gfns": _runs(GUEST_PAGES, ACCESS_LIMIT, required=True), "off": _int(0, 0, PAGE_SIZE)}
_L2_PAGES = _runs(GUEST_PAGES, ACCESS_LIMIT, required=True)
_REGION = {
    "slot": _SLOT, "gpa": _ADDRESS, "size": _int(None, -INT64, UINT64), "backing": _text(required=False),
    "off": _ADDRESS, "flags": _int(0, 0, 1 << 32), "hva": _ADDRESS,
}  # fmt: skip

GUEST_OPS = (
    "guest_read", "guest_write", "guest_rmw", "guest_cmpxchg_fail", "guest_read_write", "guest_exec", "guest_insb",
)  # fmt: skip
L2_OPS = ("l2_read", "l2_write", "l2_rmw", "l2_cmpxchg_fail", "l2_read_write", "l2_exec", "l2_insb")
L1_OPS = ("enter_l2", "leave_l2", "guest_seq", "l1_ept_write", "l1_invept", "l1_pml")
RUN_OPS = frozenset({*GUEST_OPS, *L2_OPS, *L1_OPS, "resume"})  # those in which a vCPU runs

OPS: dict[str, dict[str, Arg]] = {
    "new_vm": {
        "vcpus": _int(1, 1, VCPU_LIMIT), "mode": _word("flat", "flat", "long"), "guest_page": _word("2m", "4k", "2m"),
        "guest_ad": _int(1, 0, 2), "manual": _int(None), "ring_bytes": _int(0, 0, 1 << 32),
        "nested": _word(None, "auto"), "l2_ept": _int(1, 0, 2), "l2_ad": _int(1, 0, 2), "l2_pml": _FLAG,
        "roots": _int(1, 1, ROOT_LIMIT + 1),
    },
    "backing": {
        "name": _text(), "kind": _word(None, "4k", "thp", "hugetlb2m", "hugetlb1g", "shm", required=True),
        "size": _int(None, 1, BACKING_LIMIT + 1, required=True), "populate": _int(1, 0, 2),
        "align": _int(None, PAGE_SIZE, BACKING_LIMIT), "off": _int(0, 0, BACKING_LIMIT),
    },
    "create_slot": _REGION,
    "set_region": _REGION,
    "set_flags": {"slot": _SLOT, "flags": _int(0, 0, 1 << 32)},
    "move_slot": {"slot": _SLOT, "gpa": _ADDRESS, "flags": _int(None, 0, 1 << 32)},
    "delete_slot": {"slot": _SLOT},
    **dict.fromkeys(GUEST_OPS, _GUEST),
    "resume": {"vcpu": _VCPU},
    "l2_map": {
        "gfns": _L2_PAGES, "l1": _int(None, 0, PAGE_LIMIT), "level": _int(1, 1, 3), "perm": _int(7, 0, 8), "ad": _int(3, 0, 4),
        "same": _FLAG, "root": _int(0, 0, ROOT_LIMIT),
    },
    "l2_tables": {"gfns": _L2_PAGES},
    **dict.fromkeys(L2_OPS, _GUEST),
    "enter_l2": {"vcpu": _VCPU},
    "leave_l2": {"vcpu": _VCPU},
    "guest_seq": {"vcpu": _VCPU, "seq": Arg("seq", None, ACCESS_LIMIT, GUEST_PAGES, required=True)},
    "l1_ept_write": {"vcpu": _VCPU, "gfns": _L2_PAGES, "to": _int(None, 0, 8), "remap": _int(None, 0, PAGE_LIMIT)},
    "l1_invept": {"vcpu": _VCPU},
    "l1_pml": {"vcpu": _VCPU},
    "get_dirty_log": {"slot": _SLOT, "badptr": _FLAG},
    "clear_dirty_log": {
        "slot": _SLOT, "first": _ADDRESS, "num": _int(None, -INT64, UINT64),
        "bits": _runs(1 << 32, 1 << 32, "all", "none", default="all"), "badptr": _FLAG,
    },
    "collect_ring": {"vcpu": _VCPU, "max": _int(None, 0, INT64), "noreset": _FLAG},
    "reset_rings": {},
    "enable_cap": {"cap": _int(None, 0, 1 << 32, required=True), "arg0": _int(0)},
    "check_ext": {"cap": _int(None, 0, 1 << 32, required=True), "vm": _int(1, 0, 2)},
    "set_msr": {"vcpu": _VCPU, "index": _int(None, 0, 1 << 32, required=True), "data": _int(0, -INT64, UINT64)},
    "set_nr_mmu_pages": {"n": _int(None, 0, UINT64, required=True)},
    "prefault": {"vcpu": _VCPU, "gpa": _ADDRESS, "size": _int(None, -INT64, UINT64, required=True), "flags": _int(0)},
    "madvise": {"backing": _text(), "pages": _PAGES, "advice": _int(4, 0, 256)},
    "mprotect": {"backing": _text(), "pages": _PAGES, "prot": _int(3, 0, 8)},
    "host_write": {"backing": _text(), "pages": _PAGES},
    "fork": {},
    "clear_refs": {"val": _int(1, 0, 6)},
    "param": {"name": _text(), "val": _text(), "mod": _text(required=False)},
    "check_mem": {"backing": _text(), "pages": _PAGES, "off": _int(0, 0, PAGE_SIZE)},
    "sleep": {"ms": _int(1, 0, 1 << 31)},
    "note": {"text": Arg("any")},
    "set": {"trace": _int(1, 0, 2)},
}  # fmt: skip


def is_int(value: object) -> bool:
    """Whether a JSON value is an integer (true and false are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def _fault_in_runs(value: object, arg: Arg) -> str | None:
    if isinstance(value, str) and value in arg.words:
        return None
    if not isinstance(value, list):
        return "is not a list of [first, count]"
    total = 0
    for run in value:
        if not (isinstance(run, list) and len(run) == 2 and is_int(run[0]) and is_int(run[1])):
            return f"holds {short(run)}, not a pair [first, count]"
        first, count = run
        if first < 0 or count < 0 or first + count > arg.high:
            return f"holds {short(run)}, outside 0..{arg.high}"
        total += count
    return f"names {total} pages, more than {arg.low}" if total > arg.low else None


def _fault_in_seq(text: str, arg: Arg) -> str | None:
    try:
        steps = parse_seq(text)
    except ValueError as error:
        return str(error)
    for step in steps:
        if step.kind == "switch" and step.value >= ROOT_LIMIT:
            return f"switches to root {step.value}, outside 0..{ROOT_LIMIT - 1}"
        if step.kind == "remap" and step.value >= PAGE_LIMIT:
            return f"remaps to gfn {step.value:#x}, outside 0..{PAGE_LIMIT - 1:#x}"
    return _fault_in_runs([list(run) for step in steps for run in step.runs], arg)


def _fault(value: object, arg: Arg) -> str | None:
    """Return what is wrong with `value`, None if nothing is."""
    if arg.kind == "int":
        if not is_int(value):
            return "is not an integer"
        assert isinstance(value, int)
        return None if arg.low <= value < arg.high else f"is outside {arg.low}..{arg.high - 1}"
    if arg.kind == "runs":
        return _fault_in_runs(value, arg)
    if arg.kind == "any":
        return None
    if not isinstance(value, str):
        return "is not a string"
    if arg.kind == "seq":
        return _fault_in_seq(value, arg)
    if arg.kind == "word" and value not in arg.words:
        return f"is not one of {', '.join(arg.words)}"
    return None


def short(value: object, limit: int = 60) -> str:
    """Return `value` as text of at most `limit` characters, for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit of digits
        text = "a huge number"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_args(op: str, args: Mapping[str, Any], where: str) -> None:
    """Raise RecordingError if a known argument of a known op is missing, of a wrong type or out of bounds."""
    for name, arg in OPS.get(op, {}).items():
        if name not in args:
            if arg.required:
                raise RecordingError(f"{where}: {op} needs the argument {name!r}")
            continue
        fault = _fault(args[name], arg)
        if fault:
            raise RecordingError(f"{where}: argument {name!r} of {op}, {short(args[name])}, {fault}")
    if op == "l1_ept_write" and ("to" in args) == ("remap" in args):
        raise RecordingError(f"{where}: l1_ept_write needs one of the arguments 'to' and 'remap'")


def unknown_args(op: str, args: Mapping[str, Any]) -> list[str]:
    """Return the arguments that the known op `op` does not have."""
    return [name for name in args if name not in OPS[op]]


def with_defaults(op: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return `args` of a known op, completed with the defaults; None where the default depends on state."""
    return {name: args.get(name, arg.default) for name, arg in OPS[op].items()}
