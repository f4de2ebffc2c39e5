"""The host's KVM in the place of the model: the ops of a recording are performed on it by the functions of the replay."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import Any

from spte.devkvm import abi
from spte.devkvm.device import HostMemory, HostVm, ioctl
from spte.devkvm.guest import RET, HostGuest
from spte.devkvm.host import Host
from spte.errors import KvmError
from spte.mm import PROT_READ, PROT_READ_WRITE
from spte.recording.ops import GUEST_OPS, UINT64, RecordingError, short, with_defaults
from spte.replay import nested_ops as nested
from spte.replay import ops as replay
from spte.replay.guest import UnsupportedOp
from spte.replay.host import ADVICE
from spte.replay.machine import TSS, Args, Machine, Region, Result, success
from spte.replay.payload import CODE, CODE_PAGES, CODE_SLOT, PML4, TABLE_PAGES, TABLE_SLOT, identity_map
from spte.vm.memslots import ADDRESS_SPACES

POPULATED = (0, 16)  # bytes of a page where a populated backing holds a `ret`
HUGETLB = {"hugetlb2m": 21, "hugetlb1g": 30}
FAR = 1 << 36  # bytes
MEMORY_SHARE = 2  # a recording may ask for this part of the memory that is free


class SkippedOp(Exception):  # noqa: N818 - it is a finding about the host, not an error of the caller
    """An op that this host does not perform, and without which the recording can go on."""


class HostMachine(Machine):
    """A recording's machine on the host's KVM.

    Parameters
    ----------
    host : Host
        What stands for the host in the model.
    kvm : int
        Descriptor of /dev/kvm; the caller's to close.
    """

    def __init__(self, host: Host, kvm: int) -> None:
        super().__init__(host.header)
        self._kvm, self._user = kvm, host.user_mode
        self._host_vm: HostVm | None = None
        self._host_guest: HostGuest | None = None
        self.memory_of: dict[str, HostMemory] = {}
        self.address_spaces = max(ioctl(kvm, abi.CHECK_EXTENSION, abi.CAP_ADDRESS_SPACES), 1)

    @property
    def has_vm(self) -> bool:
        """Whether there is a VM."""
        return self._host_vm is not None

    @property
    def vm(self) -> Any:
        """The VM; RecordingError before the first new_vm."""
        if self._host_vm is None:
            raise RecordingError("an op that needs a VM stands before the first new_vm")
        return self._host_vm

    @property
    def guest(self) -> Any:
        """The VM's guest; RecordingError before the first new_vm."""
        if self._host_guest is None:
            raise RecordingError("a guest op stands before the first new_vm")
        return self._host_guest

    def backing(self, name: str) -> Any:
        """Return host memory by name; RecordingError if the recording did not make it."""
        if name not in self.memory_of:
            raise RecordingError(f"backing {short(name)} is used before it is made")
        return self.memory_of[name]

    def open(self, vcpus: int, ring_bytes: int) -> None:
        """Make a VM without memslots in place of the last one; IoctlError as the kernel refuses it."""
        self.close()
        self._host_vm = HostVm(self._kvm, vcpus, ring_bytes)
        self.regions, self.fetch_index = {}, {}
        if self.config == "intel-shadow":  # as the recorder
            ioctl(self._host_vm.fd, abi.SET_TSS_ADDR, TSS << 12)

    def close(self) -> None:
        """Destroy the VM, if there is one; host memory stays."""
        if self._host_vm is not None:
            self._host_vm.close()
        self._host_vm = self._host_guest = None

    def load_payload(self, mode: str, *, small_pages: bool, used: bool) -> None:
        """Give the VM the payload's slots, and its vCPUs the guest program."""
        code, paging = HostMemory(CODE_PAGES << 12, huge=False), mode == "long" or self._user
        code.fill(0, 0)
        self._set_own(CODE_SLOT, Region(CODE << 12, CODE_PAGES << 12), code)
        if paging:
            tables = HostMemory(TABLE_PAGES << 12, huge=False)
            tables.fill(0, 0)
            identity_map(lambda gfn: tables.table(gfn - PML4), small_pages=small_pages, used=used)
            self._set_own(TABLE_SLOT, Region(PML4 << 12, TABLE_PAGES << 12), tables)
        self._host_guest = HostGuest(self.vm.vcpus, code, paging=paging, user=self._user)

    def _set_own(self, slot: int, region: Region, memory: HostMemory) -> None:
        self.memory_of[f"slot {slot}"] = memory
        self.set_region(slot, region._replace(backing=memory))  # type: ignore[arg-type]

    def write_commands(self, gfn: int = 0) -> None:
        """Do nothing: the guest's commands are written when it starts."""

    def perform(self, op: str, args: Mapping[str, Any], record: Args) -> Result:
        """Perform an op.

        Raises
        ------
        UnsupportedOp
            The host does not perform it, and the recording can not go on.
        SkippedOp
            It does not, and the recording can.
        RecordingError
            The op refers to something that the recording did not make.
        """
        if op in nested.HANDLERS or args.get("nested") is not None:
            raise UnsupportedOp(f"op {op}: the guest runs no guests here")
        if op not in _HANDLERS:
            raise UnsupportedOp(f"op {short(op)}: this process does not do it to itself")
        given = with_defaults(op, args)
        if op == "check_ext" and given["cap"] not in _CAPABILITIES:
            raise SkippedOp(f"capability {given['cap']}: the model does not say")
        of_smm = given.get("slot", 0) >> 16 == 1 or (op == "check_ext" and given["cap"] == abi.CAP_ADDRESS_SPACES)
        if of_smm and self.address_spaces < ADDRESS_SPACES:
            raise SkippedOp("its KVM has one address space: no system management mode")
        if abs(given.get("off", 0)) >= FAR and op in ("create_slot", "set_region"):
            raise SkippedOp("memory so far from a backing: whether the process may have it depends on where that lies")
        if op in _RUNS and not all(map(_is_backed, self.regions.values())):
            raise UnsupportedOp(f"op {op}: a slot maps memory of this process that is no backing's, which the guest must not reach")
        try:
            return _HANDLERS[op](self, given, record)
        except KvmError as error:
            raise UnsupportedOp(f"op {op}: {error}") from None


def _is_backed(region: Region) -> bool:
    """Tell whether a slot maps nothing but memory of its backing."""
    return region.backing is not None and 0 <= region.off <= region.off + region.size <= region.backing.size


def _backing(machine: HostMachine, args: Args, record: Args) -> Result:
    kind, size, hugetlb = args["kind"], args["size"], HUGETLB.get(args["kind"], 0)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if args["populate"] and size > free // MEMORY_SHARE:
        raise UnsupportedOp(f"a backing of {size >> 20} MiB, with {free >> 20} MiB of memory free")
    try:
        memory = HostMemory(
            size, align=args["align"] or 1 << 21, offset=args["off"], shared=kind == "shm", hugetlb=hugetlb,
            huge={"4k": False, "thp": True}.get(kind),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UnsupportedOp(f"a backing of {size >> 20} MiB of kind {kind}: {error}") from None
    if args["populate"]:
        memory.fill(RET, *POPULATED)
    machine.memory_of[args["name"]] = memory
    return {"ret": 0, "hva_mod_1g": memory.hva % (1 << 30)}


def _param(machine: HostMachine, args: Args, record: Args) -> Result:
    """Leave the host's parameter as it is; the model follows it."""
    if args["name"] not in machine.params:
        raise SkippedOp(f"parameter {short(args['name'])}")
    return {"now": "Y" if machine.params[args["name"]] else "N"}


def _set_msr(machine: HostMachine, args: Args, record: Args) -> Result:
    if args["index"] != replay.MSR_WALL_CLOCK:
        raise SkippedOp(f"MSR {args['index']:#x}: when KVM writes its page depends on time")
    return success(ret=machine.vcpu(args["vcpu"]).set_msr(args["index"], args["data"] % UINT64))  # type: ignore[attr-defined]


def _on_pages(call: Callable[[Any, int, int], None], machine: HostMachine, args: Args) -> Result:
    """Call a function on each range of a backing's pages; returns how the last one ended, as the recorder."""
    memory, code = machine.backing(args["backing"]), 0
    for first, count in args["pages"]:
        if (first + count) << 12 > memory.size:
            raise RecordingError(f"[{first}, {count}] is outside backing {short(args['backing'])}")
        code = 0
        try:
            call(memory, first, count)
        except OSError as error:
            code = error.errno or errno.EIO
    return {"ret": -1 if code else 0, "errno": errno.errorcode[code] if code else "0"}


def _madvise(machine: HostMachine, args: Args, record: Args) -> Result:
    if args["advice"] not in ADVICE:
        raise RecordingError(f"advice {args['advice']} is not known; known are {', '.join(map(str, ADVICE))}")
    return _on_pages(lambda memory, first, count: memory.advise(args["advice"], first, count), machine, args)


def _mprotect(machine: HostMachine, args: Args, record: Args) -> Result:
    if args["prot"] not in (PROT_READ, PROT_READ_WRITE):
        raise RecordingError(f"prot {args['prot']} is not known; known are {PROT_READ} and {PROT_READ_WRITE}")
    return _on_pages(lambda memory, first, count: memory.protect(args["prot"], first, count), machine, args)


def _host_write(machine: HostMachine, args: Args, record: Args) -> Result:
    _on_pages(lambda memory, first, count: memory.write(first, count), machine, args)
    return {}


_CAPABILITIES = frozenset({
    abi.CAP_MEMSLOTS, abi.CAP_ADDRESS_SPACES, abi.CAP_MANUAL_PROTECT, abi.CAP_RING, abi.CAP_RING_ACQ_REL, abi.CAP_RING_WITH_BITMAP,
    abi.CAP_PRE_FAULT,
})  # fmt: skip
_RUNS = frozenset({*GUEST_OPS, "resume", "prefault", "set_msr"})  # those in which guest memory may be written
_SAME = (
    "new_vm", "create_slot", "set_region", "set_flags", "move_slot", "delete_slot", *GUEST_OPS, "resume", "get_dirty_log",
    "clear_dirty_log", "collect_ring", "reset_rings", "enable_cap", "check_ext", "prefault", "set_nr_mmu_pages",
    "check_mem", "sleep", "note", "set",
)  # fmt: skip
_HANDLERS: dict[str, Callable[[Any, Args, Args], Result]] = {
    **{op: replay.HANDLERS[op] for op in _SAME},
    "backing": _backing, "param": _param, "set_msr": _set_msr, "madvise": _madvise, "mprotect": _mprotect, "host_write": _host_write,
}  # fmt: skip
