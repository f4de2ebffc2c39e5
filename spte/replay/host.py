"""Ops of a recording on host memory, and those that map or limit without the guest."""

from __future__ import annotations

from spte import mm
from spte.errors import KvmError
from spte.recording.ops import UINT64, RecordingError, short
from spte.replay.machine import Args, Machine, Result, failure, ioctl, success

SOFT_DIRTY = 4  # /proc/PID/clear_refs: write-protect every page; 1 only takes referenced bits
ADVICE = (mm.DONTNEED, mm.FREE, mm.COLD, mm.PAGEOUT)


def _host_result(record: Args) -> Result:
    """Return what the host answered: an input."""
    return {name: record[name] for name in ("ret", "errno") if name in record}


def _pages_of(machine: Machine, args: Args) -> list[tuple[int, int]]:
    """Return the ranges of pages; RecordingError if one lies outside the backing."""
    pages = machine.backing(args["backing"]).size >> 12
    for first, count in args["pages"]:
        if first + count > pages:
            raise RecordingError(f"[{first}, {count}] is outside backing {short(args['backing'])} of {pages} pages")
    return [(first, count) for first, count in args["pages"]]


def host_write(machine: Machine, args: Args, record: Args) -> Result:
    """Store into pages from userspace."""
    for first, count in _pages_of(machine, args):
        machine.backing(args["backing"]).write(first, count)
    return {}


def madvise(machine: Machine, args: Args, record: Args) -> Result:
    """Advise on each range."""
    if args["advice"] not in ADVICE:
        raise RecordingError(f"advice {args['advice']} is not known; known are {', '.join(map(str, ADVICE))}")
    for first, count in _pages_of(machine, args):
        mm.madvise(machine.backing(args["backing"]), first, count, args["advice"], ages=machine.policy.pageout == "age")
    return _host_result(record)


def mprotect(machine: Machine, args: Args, record: Args) -> Result:
    """Change the protection of one range."""
    if args["prot"] not in (mm.PROT_READ, mm.PROT_READ_WRITE):
        raise RecordingError(f"prot {args['prot']} is not known; known are {mm.PROT_READ} and {mm.PROT_READ_WRITE}")
    for first, count in _pages_of(machine, args):
        mm.mprotect(machine.backing(args["backing"]), first, count, args["prot"], restores=machine.policy.mprotect_restores)
    return _host_result(record)


def fork(machine: Machine, args: Args, record: Args) -> Result:
    """Fork the process, the VM's memory with it."""
    mm.fork(machine.process_memory())
    return _host_result(record)


def clear_refs(machine: Machine, args: Args, record: Args) -> Result:
    """Write-protect every page of the process, if soft-dirty is asked for."""
    if args["val"] == SOFT_DIRTY:
        mm.clear_refs(machine.process_memory())
    return _host_result(record)


def set_nr_mmu_pages(machine: Machine, args: Args, record: Args) -> Result:
    """KVM_SET_NR_MMU_PAGES."""
    return ioctl(lambda: machine.vm.set_nr_mmu_pages(args["n"]))


def prefault(machine: Machine, args: Args, record: Args) -> Result:
    """KVM_PRE_FAULT_MEMORY; after an error the range is as it was."""
    gpa, size = args["gpa"] % UINT64, args["size"] % UINT64
    try:
        gpa, size = machine.vcpu(args["vcpu"]).prefault(gpa, size, args["flags"])
    except KvmError as error:
        return {**failure(error), "left_gpa": gpa, "left_size": size}
    return {**success(), "left_gpa": gpa, "left_size": size}
