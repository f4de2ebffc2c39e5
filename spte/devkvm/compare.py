"""One recording's ops on the host's KVM and on the model, side by side: what userspace sees is compared after each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from spte.check.run import Finding
from spte.devkvm.host import Host
from spte.devkvm.machine import HostMachine, SkippedOp
from spte.recording.file import Recording
from spte.recording.ops import OPS, RecordingError, short, unknown_args
from spte.replay.guest import HALT, UnsupportedOp
from spte.replay.run import Replay

COMPARED = (
    "ret", "errno", "manual_ret", "manual_errno", "ring_ret", "ring_errno", "dirty", "bytes", "entries", "n", "left_gpa", "left_size",
)  # fmt: skip
_HOST_ANSWERS = ("backing", "madvise", "mprotect")  # what the host's memory says is an input of the model


@dataclass(frozen=True, slots=True)
class Report:
    """What the comparison of one recording found.

    Parameters
    ----------
    name : str
        The recording's name.
    ops, fields : int
        Ops performed on both sides, and values compared.
    finding : Finding or None
        The first difference; the comparison of a recording ends there. `expected` is the kernel's value.
    skipped : tuple of str
        Ops that this host does not perform, and why, one text each.
    ended : str or None
        Why the comparison ended before the recording, if not by a difference.
    """

    name: str
    ops: int
    fields: int
    finding: Finding | None = None
    skipped: tuple[str, ...] = field(default=())
    ended: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return asdict(self)


def compare(recording: Recording, host: Host, kvm: int) -> Report:
    """Perform `recording` on the host's KVM and on the model; what was recorded does not matter, its ops do.

    Parameters
    ----------
    recording : Recording
        Its ops and their arguments are taken.
    host : Host
        What stands for the host in the model.
    kvm : int
        Descriptor of /dev/kvm.

    Returns
    -------
    Report
        Counts, the first difference if there is one, and what was not performed.

    Raises
    ------
    RecordingError
        The recording can not be performed as written.
    """
    machine, model = HostMachine(host, kvm), Replay(host.header)
    ops, fields = 0, 0
    skipped: list[str] = []
    try:
        for record in recording.records:
            i, op, args = record["i"], record["op"], record["args"]
            where = f"op {i} {op}"
            if op not in OPS or unknown_args(op, args):
                return Report(recording.name, ops, fields, None, tuple(skipped), f"{where}: {short(args)} is not known")
            asked = {"i": i, "op": op, "args": args}
            try:
                theirs = machine.perform(op, args, asked)
                ours = model.step(_for_model(asked, theirs, host))
            except SkippedOp as why:
                skipped.append(f"{where}: {why}")
                continue
            except UnsupportedOp as why:
                return Report(recording.name, ops, fields, None, tuple(skipped), f"{where}: {why}")
            for key, kernel, mine in _values(op, theirs, ours):
                fields += 1
                if kernel != mine:
                    return Report(recording.name, ops, fields, Finding(i, op, key, None, None, kernel, mine), tuple(skipped))
            ops += 1
    except RecordingError as error:
        raise RecordingError(f"{recording.name}: {error}") from None
    finally:
        machine.close()
        model.machine.close()
    return Report(recording.name, ops, fields, None, tuple(skipped))


def _for_model(asked: dict[str, Any], theirs: dict[str, Any], host: Host) -> dict[str, Any]:
    """Return the record that the model is given: the op, and what the host's memory and parameters answered."""
    names = ("hva_mod_1g", "now", *(("ret", "errno") if asked["op"] in _HOST_ANSWERS else ()))
    record = {**asked, **{name: theirs[name] for name in names if name in theirs}}
    if asked["op"] == "backing" and asked["args"]["kind"] == "thp" and not host.thp:
        record["args"] = {**asked["args"], "kind": "4k"}
    if asked["op"] == "new_vm" and host.user_mode:
        record["args"] = {**asked["args"], "mode": "long"}
    return record


def _values(op: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is compared of an op: the value's name, the kernel's, the model's."""
    if op in _HOST_ANSWERS:
        return
    for key in COMPARED:
        if key in theirs or key in ours:
            yield key, theirs.get(key), ours.get(key)
    if op.startswith("guest_") or op == "resume":
        yield "exits", theirs.get("exits", [HALT]), ours.get("exits", [HALT])
