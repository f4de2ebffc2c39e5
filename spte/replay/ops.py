"""The ops of a recording performed on the model: one function an op, which returns what the op itself gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spte.errors import KvmError
from spte.recording.file import bitmap_of, bits_of, expand, runs_of
from spte.recording.ops import GUEST_OPS, UINT64, RecordingError, is_int, short
from spte.replay import host
from spte.replay import nested_ops as nested
from spte.replay.guest import HALT, Exits, UnsupportedOp
from spte.replay.machine import Args, Machine, Region, Result, failure, ioctl, make_backing, success
from spte.replay.nested import NestedGuest
from spte.replay.payload import CODE, COMMAND_LIMIT, Command

CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
MSR_WALL_CLOCK, MSR_KVMCLOCK, MSR_STEAL_TIME = 0x4B564D00, 0x4B564D01, 0x4B564D03
WALL_CLOCK_WRITES = (4, 12, 4)  # bytes: version, the clock, version again; all from its start on
RING_DIRTY, RING_RESET = 1, 2  # bits of kvm_dirty_gfn.flags

def _unusable_buffer() -> Any:
    """Return what stands for a bad user pointer: memory that can not be written and holds no bitmap."""
    buffer = np.zeros(0, np.uint64)
    buffer.flags.writeable = False
    return buffer


def _new_vm(machine: Machine, args: Args, record: Args) -> Result:
    result: Result = {"ret": 0}
    vcpus: int = args["vcpus"]
    if "ring_bytes" in record["args"]:
        result |= ioctl(lambda: machine.open(vcpus, args["ring_bytes"]), "ring_")
    if not machine.has_vm or "ring_bytes" not in record["args"]:
        machine.open(vcpus, 0)
    if args["manual"] is not None:
        enable = lambda: machine.vm.enable_cap(CAP_MANUAL_DIRTY_LOG_PROTECT2, args["manual"])  # noqa: E731
        result |= ioctl(enable, "manual_")
    if args["nested"] is not None:
        return result | nested.load(machine, args)
    machine.load_payload(args["mode"], small_pages=args["guest_page"] == "4k", used=bool(args["guest_ad"]))
    for vcpu in range(vcpus):
        machine.guest.start(vcpu, [Command("guest_read", CODE, 1, 0)])
    return result


def _backing(machine: Machine, args: Args, record: Args) -> Result:
    offset = record.get("hva_mod_1g")
    if offset is not None and not is_int(offset):
        raise RecordingError(f"hva_mod_1g is {short(offset)}, not a number of bytes")
    populate, align = bool(args["populate"]), args["align"]
    machine.backings[args["name"]] = make_backing(
        args["name"], args["kind"], args["size"], align=align, populate=populate, hva_offset=offset
    )
    return {"ret": 0}


def _set_region(machine: Machine, args: Args, record: Args) -> Result:
    backing = machine.backing(args["backing"]) if args["backing"] is not None else None
    size = args["size"] if args["size"] is not None else (backing.size if backing else 0)
    region = Region(args["gpa"], size, backing, args["off"], args["flags"], args["hva"])
    return ioctl(lambda: machine.set_region(args["slot"], region))


def _set_flags(machine: Machine, args: Args, record: Args) -> Result:
    region = machine.regions.get(args["slot"])
    if region is None:
        return {}
    return ioctl(lambda: machine.set_region(args["slot"], region._replace(flags=args["flags"])))


def _move_slot(machine: Machine, args: Args, record: Args) -> Result:
    region = machine.regions.get(args["slot"])
    if region is None:
        return {}
    flags = region.flags if args["flags"] is None else args["flags"]
    return ioctl(lambda: machine.set_region(args["slot"], region._replace(gpa=args["gpa"], flags=flags)))


def _delete_slot(machine: Machine, args: Args, record: Args) -> Result:
    return ioctl(lambda: machine.set_region(args["slot"], Region(0, 0)))


def _get_dirty_log(machine: Machine, args: Args, record: Args) -> Result:
    try:
        bitmap = machine.vm.get_dirty_log(args["slot"], _unusable_buffer() if args["badptr"] else None)
    except KvmError as error:
        return failure(error)
    return {**success(), "bytes": bitmap.nbytes, "dirty": runs_of(bits_of(bitmap))}


def _clear_dirty_log(machine: Machine, args: Args, record: Args) -> Result:
    region = machine.regions.get(args["slot"])
    npages = region.size >> 12 if region else 64
    num = npages if args["num"] is None else args["num"] % (1 << 32)
    size = min(num, npages)  # a longer range is refused before the bitmap is looked at
    bits = {"all": [[0, size]], "none": []}[args["bits"]] if isinstance(args["bits"], str) else args["bits"]
    bitmap = _unusable_buffer() if args["badptr"] else bitmap_of(expand(bits), size)
    return ioctl(lambda: machine.vm.clear_dirty_log(args["slot"], args["first"] % UINT64, num, bitmap))


def _collect_ring(machine: Machine, args: Args, record: Args) -> Result:
    ring = machine.vcpu(args["vcpu"]).ring
    entries: list[list[int]] = []
    limit = len(ring) if args["max"] is None else args["max"]
    at = machine.fetch_index.get(args["vcpu"], 0)
    while len(entries) < min(limit, len(ring)) and ring["flags"][at % len(ring)] == RING_DIRTY:
        entry = ring[at % len(ring)]
        entries.append([int(entry["slot"]), int(entry["offset"])])
        if not args["noreset"]:
            ring["flags"][at % len(ring)] |= RING_RESET
        at += 1
    machine.fetch_index[args["vcpu"]] = at
    return {"entries": entries, "n": len(entries)}


def _reset_rings(machine: Machine, args: Args, record: Args) -> Result:
    return ioctl(machine.vm.reset_dirty_rings)


def _enable_cap(machine: Machine, args: Args, record: Args) -> Result:
    return ioctl(lambda: machine.vm.enable_cap(args["cap"], args["arg0"]))


def _check_ext(machine: Machine, args: Args, record: Args) -> Result:
    return ioctl(lambda: machine.vm.check_extension(args["cap"]))


def _param(machine: Machine, args: Args, record: Args) -> Result:
    name = args["name"]
    if name not in machine.params:
        raise UnsupportedOp(f"module parameter {short(name)}")
    now = record.get("now", {"force": "Y", "off": "N"}.get(args["val"], args["val"]))
    if name in machine.replaced:
        return {"now": now}
    machine.params[name] = now == "Y"
    if machine.has_vm:
        machine.vm.set_param(name, machine.params[name])
    return {"now": now}


def _exits(exits: Exits) -> Result:
    return {} if exits == [HALT] else {"exits": exits}


def _guest(machine: Machine, args: Args, record: Args) -> Result:
    if isinstance(machine.guest, NestedGuest):
        return nested.access(machine, args, record)
    if len(args["gfns"]) > COMMAND_LIMIT:
        raise UnsupportedOp(f"{len(args['gfns'])} ranges, more than the command pages hold ({COMMAND_LIMIT})")
    events = _clock_writes(machine, args["vcpu"], record)
    machine.write_commands()
    commands = [Command(record["op"], first, count, args["off"]) for first, count in args["gfns"]]
    return {**_exits(machine.guest.start(args["vcpu"], commands)), **events}


def _resume(machine: Machine, args: Args, record: Args) -> Result:
    if isinstance(machine.guest, NestedGuest):
        return nested.result_of(machine, machine.guest.resume(args["vcpu"]))
    events = _clock_writes(machine, args["vcpu"], record)
    return {**_exits(machine.guest.resume(args["vcpu"])), **events}


def _clock_writes(machine: Machine, vcpu: int, record: Args) -> Result:
    """Do KVM's own writes of the clock pages at this entry: when they fall due only the recording knows."""
    machine.vcpu(vcpu)
    pages = {gfn for (owner, _), gfn in machine.clock_pages.items() if owner == vcpu}
    marks = [e[:2] for e in record.get("events", ()) if isinstance(e, list) and e[:1] == ["mark_dirty"]]
    due = [mark for mark in marks if mark[1:] and is_int(mark[1]) and mark[1] in pages]
    for _, gfn in due:
        machine.kernel_write(vcpu, gfn)
    return {"events": due} if due else {}


def _set_msr(machine: Machine, args: Args, record: Args) -> Result:
    vcpu, index, data = args["vcpu"], args["index"], args["data"] % UINT64
    machine.vcpu(vcpu)
    if index == MSR_WALL_CLOCK:
        for length in WALL_CLOCK_WRITES:
            for gfn in range(data >> 12, ((data + length - 1) >> 12) + 1):
                if machine.region_at(gfn) is not None:
                    machine.kernel_write(vcpu, gfn)
    elif index in (MSR_KVMCLOCK, MSR_STEAL_TIME):
        machine.clock_pages.pop((vcpu, index), None)
        if data & 1:
            machine.clock_pages[vcpu, index] = data >> 12
    else:
        raise UnsupportedOp(f"MSR {index:#x}")
    return success(ret=1)


def _nothing(machine: Machine, args: Args, record: Args) -> Result:
    return {}


HANDLERS: dict[str, Callable[[Machine, Args, Args], Result]] = {
    "new_vm": _new_vm,
    "backing": _backing,
    "create_slot": _set_region,
    "set_region": _set_region,
    "set_flags": _set_flags,
    "move_slot": _move_slot,
    "delete_slot": _delete_slot,
    **dict.fromkeys(GUEST_OPS, _guest),
    "resume": _resume,
    "get_dirty_log": _get_dirty_log,
    "clear_dirty_log": _clear_dirty_log,
    "collect_ring": _collect_ring,
    "reset_rings": _reset_rings,
    "enable_cap": _enable_cap,
    "check_ext": _check_ext,
    "set_msr": _set_msr,
    "param": _param,
    "host_write": host.host_write,
    "madvise": host.madvise,
    "mprotect": host.mprotect,
    "fork": host.fork,
    "clear_refs": host.clear_refs,
    "prefault": host.prefault,
    "set_nr_mmu_pages": host.set_nr_mmu_pages,
    **nested.HANDLERS,
    "check_mem": _nothing,
    "sleep": _nothing,
    "note": _nothing,
    "set": _nothing,
}
