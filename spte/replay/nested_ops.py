"""The ops of a recording whose guest runs a guest, performed on the model: one function an op."""

from __future__ import annotations

from collections.abc import Callable

from spte.errors import GuestTablesError
from spte.platform import EPT, SHADOW
from spte.recording.file import expand
from spte.recording.ops import L2_OPS, RecordingError
from spte.recording.seq import Step, parse_seq
from spte.replay.guest import HALT, Exits, UnsupportedOp
from spte.replay.machine import Args, Machine, Result
from spte.replay.nested import COMMAND_LIST, L1_PML, L1_STACK, L2_STACK, VCPU_PAGES, L2Setup, NestedGuest
from spte.replay.payload import CODE, Payload
from spte.replay.payload_tables import L1Tables

CODE_PAGES = 256


def load(machine: Machine, args: Args) -> Result:
    """Give the VM the payload of a guest that runs a guest, and let each vCPU set itself up."""
    platform, small_pages = machine.platform, args["guest_page"] == "4k"
    setup = L2Setup(bool(args["l2_ept"]), bool(args["l2_ad"]), bool(args["l2_pml"]))
    if setup.ept and platform.paging == SHADOW:
        raise RecordingError("l2_ept=1 needs EPT or NPT of the machine; this one has neither")
    if setup.pml and not (platform.paging == EPT and setup.ept and setup.ad and platform.ad_bits):
        raise RecordingError("l2_pml=1 needs EPT with A/D bits, of the machine and of L1 (l2_ept=1, l2_ad=1)")
    machine.load_code(CODE_PAGES)
    machine.load_tables(small_pages=small_pages, used=True)
    ad_in_l2 = platform.paging != EPT or (setup.ept and setup.ad and platform.ad_bits)

    def payload(vcpu: int, *, stack: int, ad: bool) -> Payload:
        base = CODE + vcpu * VCPU_PAGES
        return Payload(
            locked_reads_first=not machine.intel, mode="long", small_pages=small_pages, walk_kind=machine.walk_kind(ad=ad),
            code=base, stack=base + stack,
        )  # fmt: skip

    payloads = tuple(
        (payload(v, stack=L1_STACK, ad=platform.ad_bits), payload(v, stack=L2_STACK, ad=ad_in_l2)) for v in range(args["vcpus"])
    )
    machine.l1_tables = L1Tables(machine.table_memory, ept=platform.paging == EPT, roots=args["roots"]) if setup.ept else None
    guest = NestedGuest(machine.vm.vcpus, payloads, machine.memory, machine.l1_tables, setup, intel=machine.intel)
    machine.take_guest(guest)
    result: Result = {}
    for vcpu in range(args["vcpus"]):
        guest.begin(vcpu)
        result[f"init_ret{vcpu}"] = 0
    return result


def _guest(machine: Machine) -> NestedGuest:
    if not isinstance(machine.guest, NestedGuest):
        raise RecordingError("an op of a guest that runs a guest stands in a VM that was made without nested")
    return machine.guest


def _tables(machine: Machine) -> L1Tables:
    if machine.l1_tables is None:
        raise RecordingError("an op on L1's tables for L2 stands in a VM that was made with l2_ept=0")
    return machine.l1_tables


def result_of(machine: Machine, exits: Exits) -> Result:
    """Return what a run of the nested guest gives back."""
    rows = _guest(machine).l1_exits
    return ({} if exits == [HALT] else {"exits": exits}) | ({"l1_exits": rows} if rows else {})


def _run(machine: Machine, vcpu: int, steps: list[Step], off: int = 0) -> Result:
    guest = _guest(machine)
    machine.vcpu(vcpu)
    machine.write_commands(CODE + vcpu * VCPU_PAGES + COMMAND_LIST)
    return result_of(machine, guest.run_steps(vcpu, steps, off))


def access(machine: Machine, args: Args, record: Args) -> Result:
    """Perform an op of one kind of access by L1 or L2."""
    who, kind = record["op"].split("_", 1)
    if machine.vcpu(args["vcpu"]).in_l2 != (who == "l2"):
        raise UnsupportedOp(f"{record['op']} while vCPU {args['vcpu']} runs {'L1' if who == 'l2' else 'L2'}")
    return _run(machine, args["vcpu"], [Step(kind, tuple(map(tuple, args["gfns"])))], args["off"])


def _one(kind: str) -> Callable[[Machine, Args, Args], Result]:
    return lambda machine, args, record: _run(machine, args["vcpu"], [Step(kind)])


def _seq(machine: Machine, args: Args, record: Args) -> Result:
    return _run(machine, args["vcpu"], parse_seq(args["seq"]))


def _l1_ept_write(machine: Machine, args: Args, record: Args) -> Result:
    _tables(machine)
    kind, value = ("protect", args["to"]) if args["to"] is not None else ("remap", args["remap"])
    return _run(machine, args["vcpu"], [Step(kind, tuple(map(tuple, args["gfns"])), value)])


def _l2_map(machine: Machine, args: Args, record: Args) -> Result:
    tables = _tables(machine)
    if not 0 <= args["root"] < len(tables.roots):
        raise RecordingError(f"root {args['root']} of l2_map does not exist; new_vm made {len(tables.roots)}")
    step = 512 if args["level"] == 2 else 1
    for n, gfn in enumerate(expand(args["gfns"]).tolist()):
        if gfn % step == 0:
            target = gfn if args["l1"] is None else args["l1"] + (0 if args["same"] else n)
            try:
                tables.map_recorded(gfn, target, level=args["level"], perm=args["perm"], ad=args["ad"], root=args["root"])
            except GuestTablesError as error:
                raise RecordingError(f"l2_map can not be performed: {error}") from None
    return {}


def _l2_tables(machine: Machine, args: Args, record: Args) -> Result:
    return {"entries": _tables(machine).listing(0, expand(args["gfns"]))}


def _l1_pml(machine: Machine, args: Args, record: Args) -> Result:
    """Report L1's own PML buffer, oldest entry first, and empty it."""
    vcpu = machine.vcpu(args["vcpu"])
    result = _run(machine, args["vcpu"], [])
    index = vcpu.l1_pml_index
    words = machine.code_words(CODE + args["vcpu"] * VCPU_PAGES + L1_PML)
    log = [int(words[i]) >> 12 for i in range(511, -1 if index > 511 else index, -1)]
    vcpu.l1_pml_index = 511
    return {**result, "pml_index": index, "log": log}


HANDLERS: dict[str, Callable[[Machine, Args, Args], Result]] = {
    **dict.fromkeys(L2_OPS, access),
    "enter_l2": _one("enter"),
    "leave_l2": _one("leave"),
    "guest_seq": _seq,
    "l1_ept_write": _l1_ept_write,
    "l1_invept": _one("invept"),
    "l2_map": _l2_map,
    "l2_tables": _l2_tables,
    "l1_pml": _l1_pml,
}
