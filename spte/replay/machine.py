"""The machine of one recording as a replay holds it: module parameters, host memory, the VM and its payload."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from spte import platform as platforms
from spte import policy as policies
from spte.access import READ, WRITE
from spte.arrays.records import U64s
from spte.arrays.slots import READONLY
from spte.errors import KvmError
from spte.host.backing import Backing
from spte.policy.spelling import replaced
from spte.recording.ops import UINT64, RecordingError, short
from spte.replay.guest import Guest, Memory
from spte.replay.payload import CODE, CODE_PAGES, CODE_SLOT, COMMANDS, PML4, TABLE_PAGES, TABLE_SLOT, Payload, identity_map
from spte.replay.payload_tables import L1Tables
from spte.vm.vcpu import VirtualCpu
from spte.vm.vm import VM

PLATFORMS = {
    "tdp": "npt", "legacy": "npt-rmap", "shadow": "shadow", "intel-pml": "ept-pml", "intel-nopml": "ept-nopml",
    "intel-noad": "ept-noad", "intel-pml-legacy": "ept-pml-rmap", "intel-nopml-legacy": "ept-nopml-rmap",
    "intel-noad-legacy": "ept-noad-rmap", "intel-shadow": "shadow",
}  # fmt: skip
PLATFORMS |= {f"amd-{name}": PLATFORMS[name] for name in ("tdp", "legacy", "shadow")}  # as the nested recordings spell them
RECORDED_PHYSICAL_BITS = 40  # physical address width of both recorded CPUs
TSS = 0xFFFBD  # gfn where the recorder puts the TSS
PARAMS = ("eager_page_split", "nx_huge_pages")


Args = Mapping[str, Any]
Result = dict[str, Any]


def success(prefix: str = "", ret: int | None = None) -> Result:
    """Return ``ret`` and ``errno`` of an ioctl that worked."""
    return {f"{prefix}ret": ret or 0, f"{prefix}errno": "0"}


def failure(error: KvmError, prefix: str = "") -> Result:
    """Return ``ret`` and ``errno`` of an ioctl that failed."""
    return {f"{prefix}ret": -1, f"{prefix}errno": error.errno_name}


def ioctl(call: Callable[[], int | None], prefix: str = "") -> Result:
    """Return ``ret`` and ``errno`` of an ioctl."""
    try:
        return success(prefix, call())
    except KvmError as error:
        return failure(error, prefix)


class Region(NamedTuple):
    """A memslot as the last successful KVM_SET_USER_MEMORY_REGION left it; addresses and size in bytes."""

    gpa: int
    size: int
    backing: Backing | None = None
    off: int = 0
    flags: int = 0
    hva: int = 0


class Machine:
    """The machine of one recording.

    Parameters
    ----------
    header : dict
        First line of the recording.
    events : bool
        The VM records its tracepoints.
    policy : Policy, optional
        What the kernel does, in place of what the header's kernel does.

    Raises
    ------
    RecordingError
        The header names a config or kernel that the model does not have.
    """

    def __init__(self, header: Mapping[str, Any], *, events: bool = False, policy: policies.Policy | None = None) -> None:
        self._events = events
        self.config: str = header["config"]
        self.platform = _platform(self.config)
        self.policy = _policy(header["kernel"]) if policy is None else policy
        self.replaced = replaced(self.policy)  # what the caller's policy says itself comes before recorded module parameters
        recorded = {name: header["params"].get(name, "N") == "Y" for name in PARAMS}
        self.params: dict[str, Any] = {name: getattr(self.policy, name) if name in self.replaced else on for name, on in recorded.items()}
        self.backings: dict[str, Backing] = {}
        self.regions: dict[int, Region] = {}
        self.clock_pages: dict[tuple[int, int], int] = {}  # (vCPU, MSR) -> gfn that KVM writes at entries
        self.fetch_index: dict[int, int] = {}  # of each vCPU's ring, userspace's side
        self._vm: VM | None = None
        self._guest: Guest | None = None
        self._code: Backing | None = None
        self._tables: Backing | None = None
        self.l1_tables: L1Tables | None = None  # of a guest that runs a guest

    @property
    def intel(self) -> bool:
        """Whether the recording is of an Intel machine."""
        return self.config.startswith("intel")

    @property
    def has_vm(self) -> bool:
        """Whether there is a VM."""
        return self._vm is not None

    @property
    def vm(self) -> VM:
        """The VM; RecordingError before the first new_vm."""
        if self._vm is None:
            raise RecordingError("an op that needs a VM stands before the first new_vm")
        return self._vm

    @property
    def guest(self) -> Guest:
        """The VM's guest; RecordingError before the first new_vm."""
        if self._guest is None:
            raise RecordingError("a guest op stands before the first new_vm")
        return self._guest

    def vcpu(self, index: int) -> VirtualCpu:
        """Return a vCPU; RecordingError if the VM has none of that index."""
        if index >= len(self.vm.vcpus):
            raise RecordingError(f"vcpu {index} does not exist; the VM has {len(self.vm.vcpus)}")
        return self.vm.vcpus[index]

    def backing(self, name: str) -> Backing:
        """Return host memory by name; RecordingError if the recording did not make it."""
        if name not in self.backings:
            raise RecordingError(f"backing {short(name)} is used before it is made")
        return self.backings[name]

    def process_memory(self) -> list[Backing]:
        """Return all memory of the recorded process that VMs may map, the payload's too."""
        return [*self.backings.values(), *(each for each in (self._code, self._tables) if each is not None)]

    def open(self, vcpus: int, ring_bytes: int) -> None:
        """Make a VM without memslots in place of the last one; KvmError as the VM raises it."""
        self.close()
        policy = dataclasses.replace(self.policy, **self.params)
        self._vm = VM(self.platform, policy, vcpus=vcpus, ring_bytes=ring_bytes)
        self._vm.trace_events(self._events)
        self._vm.trace_hw(self.intel)
        self.regions, self.clock_pages, self.fetch_index = {}, {}, {}
        if self.config == "intel-shadow":  # real mode needs a TSS in guest memory there
            self._vm.set_tss_addr(TSS << 12)

    def counters(self) -> dict[str, int]:
        """Return the VM's own counts, and the exits of string IO."""
        return {**self.vm.counters(), "io_exits": self.guest.io_exits}

    def close(self) -> None:
        """Destroy the VM, if there is one; host memory stays."""
        if self._vm is not None:
            self._vm.close()
        self._vm = self._guest = None

    def load_tables(self, *, small_pages: bool, used: bool) -> None:
        """Give the VM the slot with the payload's page tables, and each vCPU their root; `used`: A and D are set in them."""
        self._tables = Backing("4k", TABLE_PAGES << 12, populate=True)
        self.set_region(TABLE_SLOT, Region(PML4 << 12, TABLE_PAGES << 12, self._tables))
        identity_map(lambda gfn: self.table_memory.table(gfn - PML4), small_pages=small_pages, used=used)
        for vcpu in self.vm.vcpus:
            vcpu.load_cr3(PML4 << 12)

    @property
    def table_memory(self) -> Backing:
        """Memory of the payload's page-table slot."""
        assert self._tables is not None
        return self._tables

    def load_code(self, pages: int) -> None:
        """Give the VM the slot with the payload's program."""
        self._code = Backing("4k", pages << 12, populate=True)
        self.set_region(CODE_SLOT, Region(CODE << 12, pages << 12, self._code))

    def code_words(self, gfn: int) -> U64s:
        """Return the contents of a page of the payload's program."""
        assert self._code is not None
        return self._code.table(gfn - CODE)

    def take_guest(self, guest: Guest) -> None:
        """Let `guest` run on the VM."""
        self._guest = guest

    @property
    def memory(self) -> Memory:
        """How KVM reaches the VM's memory when it emulates."""
        return Memory(lambda gfn: self.region_at(gfn) is not None, self._writable, self.kernel_write)

    def walk_kind(self, *, ad: bool) -> int | None:
        """Return how the CPU accesses guest page tables on a root with A/D bits or without; None: KVM walks them."""
        return None if self.platform.paging == platforms.SHADOW else WRITE if ad else READ

    def load_payload(self, mode: str, *, small_pages: bool, used: bool) -> None:
        """Give the VM the payload's slots, host memory and guest program; `used`: its page tables have A and D set."""
        self.load_code(CODE_PAGES)
        if mode == "long":
            self.load_tables(small_pages=small_pages, used=used)
        payload = Payload(
            locked_reads_first=not self.intel, mode=mode, small_pages=small_pages, walk_kind=self.walk_kind(ad=self.platform.ad_bits)
        )
        self.take_guest(Guest(self.vm.vcpus, payload, self.memory, retries=self.policy.locked_readonly_retry))

    def write_commands(self, gfn: int = COMMANDS) -> None:
        """Store to the command page from userspace, as before each guest op."""
        assert self._code is not None
        self._code.write(gfn - CODE, 1)

    def set_region(self, slot: int, region: Region) -> None:
        """KVM_SET_USER_MEMORY_REGION; `regions` follows if it succeeds."""
        gpa, size, backing, off, flags, hva = region
        address = None if backing else hva % UINT64
        self.vm.set_memory_region(slot, gpa % UINT64, size % UINT64, backing, offset=off, flags=flags, hva=address)
        if size:
            self.regions[slot] = region
        else:
            self.regions.pop(slot, None)

    def region_at(self, gfn: int) -> Region | None:
        """Return the memslot of address space 0 that holds `gfn`."""
        for slot, region in self.regions.items():
            if slot >> 16 == 0 and region.gpa >> 12 <= gfn < (region.gpa + region.size) >> 12:
                return region
        return None

    def _writable(self, gfn: int) -> bool:
        region = self.region_at(gfn)
        return region is not None and not region.flags & READONLY

    def kernel_write(self, vcpu: int, gfn: int) -> None:
        """KVM stores to guest memory by the host's mapping, with `vcpu` running: no SPTE, but the page is dirty."""
        self.vm.kernel_write(gfn, vcpu)


def _platform(config: str) -> platforms.Platform:
    known = ", ".join(PLATFORMS)
    if config not in PLATFORMS:
        raise RecordingError(f"config {short(config)} is not known; known are {known}")
    preset = platforms.named(PLATFORMS[config])
    l1tf = RECORDED_PHYSICAL_BITS if config.startswith("intel") else 0
    gpa_bits = preset.gpa_bits if preset.paging == platforms.SHADOW else RECORDED_PHYSICAL_BITS
    return dataclasses.replace(preset, gpa_bits=gpa_bits, l1tf=l1tf)


def _policy(kernel: str) -> policies.Policy:
    version = policies.running(kernel)
    if version is None:
        raise RecordingError(f"kernel {short(kernel)} has no policy here; known are {policies.VERSIONS[0]} to {policies.VERSIONS[-1]}")
    return policies.Policy.named(version)


def make_backing(
    name: str, kind: str, size: int, *, align: int | None, populate: bool, hva_offset: int | None
) -> Backing:
    """Return host memory as a recording asks for it; RecordingError if there can not be such memory."""
    try:
        return Backing(kind, size, align=align, populate=populate, hva_offset=hva_offset)
    except KvmError as error:
        raise RecordingError(f"backing {short(name)}: {error}") from None
