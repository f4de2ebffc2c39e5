"""KVM's tracepoints as ftrace, `trace-cmd report` and `perf script` print them, Linux 5.x to 7.x.

======================== ==================================================================== ============================
event                    fields that are read                                                 a write of
======================== ==================================================================== ============================
kvm_page_fault           address (hex), error_code (hex, bit 1: a write)                      the page of the address
fast_page_fault          gva (hex; an address of the guest where there is EPT or NPT),        the page of the address
                         error_code (letters, W: a write)
kvm_mmu_set_spte         gfn, spte (hex), level                                               the gfn, if level is 1 and the
                                                                                              SPTE is writable
kvm_tdp_mmu_spte_changed gfn, old_spte, new_spte (hex), level                                 the gfn, if level is 1 and the
                                                                                              SPTE became writable
kvm_dirty_ring_push      slot, offset (hex)                                                   that page of the slot
======================== ==================================================================== ============================

Making an SPTE writable is where KVM marks a page dirty. A larger page that becomes writable is no write of a page:
such events are counted and told. The forms are those of include/trace/events/kvm.h, arch/x86/kvm/trace.h and
mmu/mmutrace.h.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from spte.convert import scan
from spte.convert.scan import Mask, Numbers, Uint64Array
from spte.convert.source import Block, Positions, Source
from spte.convert.writes import WAY_OUT, Writes
from spte.trace.collect import GFN_BITS

ABOUT = "KVM tracepoints: text of ftrace, trace-cmd report or perf script"
PAGE_SHIFT = np.uint64(12)
PFERR_WRITE = np.uint64(1 << 1)
"""Also bit 1 of the exit qualification that Intel's kvm_page_fault prints: a data write."""
WRITABLE = np.uint64(1 << 0 | 1 << 1 | 1 << 11)
"""In a writable leaf of any kernel from 5.x on, EPT or not: readable or present, writable, and bit 11, which is MMU-writable up to
5.12 and MMU-present from 5.13 on; an MMIO or frozen SPTE lacks one of them."""
MMIO_MASK = np.uint64(3 << 52)
"""Both bits are set in an MMIO SPTE up to 5.12, whose bit 11 belongs to its generation, and never in a writable leaf."""
LEVEL_4K = np.uint64(1)
TIME_WIDTH = 40
"""Characters of the longest time, with room for the blanks by which columns are aligned."""
_EVENT = re.compile(rb"(?:kvm_page_fault|fast_page_fault|kvm_mmu_set_spte|kvm_tdp_mmu_spte_changed|kvm_dirty_ring_push):")
_TRACE = re.compile(rb"^(?:# tracer:|cpus=\d+\s*$|version = \d+\s*$|.*\[\d{3,}\].* \d+\.\d{6,9}: )", re.MULTILINE)
_LOST = (b"LOST ", b"EVENTS DROPPED")
_COLON, _BLANK = 58, 32
_BEFORE_EVENT = np.zeros(256, np.bool_)
_BEFORE_EVENT[list(b": \n\0")] = True
Fields = dict[str, Numbers]


class Event(NamedTuple):
    """An event's subsystem, its fields with the parser of each, and what makes an event a write of which page."""

    system: bytes
    fields: dict[str, Callable[[Block, Positions, Positions], Numbers]]
    write: Callable[[Fields], tuple[Mask, Uint64Array]]


class _Part(NamedTuple):
    """A kind of event in a block: how many, how many map a large page, and time and guest page of each write."""

    events: int
    huge: int
    t_ns: Positions
    gfn: Uint64Array


def looks_like(head: bytes) -> bool:
    """Return whether a line names one of the events, or has the form of an event."""
    return bool(_EVENT.search(head) or _TRACE.search(head))


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the writes of `sources` to `writes`, and notes on what these texts say is missing."""
    seen: set[str] = set()
    huge = 0
    for source in sources:
        lost = 0
        for block in source.blocks():
            lost += sum(len(scan.find(block.data, text)) for text in _LOST)
            parts = {name: _writes(block, name, event, writes) for name, event in EVENTS.items()}
            seen |= {name for name, part in parts.items() if part.events}
            huge += sum(part.huge for part in parts.values())
            if len(seen) > 1 and RING in seen and writes.slots is None:
                raise source.error(f"{RING} names pages by slot, {min(seen - {RING})} by address; say where slots lie with {WAY_OUT}")
            t_ns = np.concatenate([part.t_ns for part in parts.values()])
            order = np.argsort(t_ns, kind="stable")
            writes.at(t_ns[order], np.concatenate([part.gfn for part in parts.values()])[order])
        if lost:
            writes.note(f"{source.name}: {lost} lines tell of lost events; the trace has fewer writes than there were")
    if huge:
        writes.note(f"{huge} writable mappings of 2 MiB or more are no writes of a page; trace while dirty logging is on")
    writes.meta["events"] = sorted(seen)


def _writes(block: Block, name: str, event: Event, writes: Writes) -> _Part:
    """Return the writes of the events `name` in a block."""
    line, t_ns, fields = _events(block, name, event)
    if not len(line):
        return _Part(0, 0, t_ns, np.empty(0, np.uint64))
    is_write, gfn = event.write(fields)
    small = fields["level"].value == LEVEL_4K if "level" in fields else np.ones(len(line), np.bool_)
    huge = int(np.count_nonzero(is_write & ~small))
    is_write &= small
    if "slot" in fields:
        gfn = writes.of_slot(fields["slot"].value, gfn, functools.partial(block.error_at, line))
    far = is_write & (gfn >> np.uint64(GFN_BITS) != 0)
    _refuse(block, line, far, "is of a page beyond 52 bits of address")
    return _Part(len(line), huge, t_ns[is_write], gfn[is_write])


def _events(block: Block, name: str, event: Event) -> tuple[Positions, Positions, Fields]:
    """Return the line, the time in ns and the fields of each event `name` in a block."""
    data = block.data
    at = scan.find(data, name.encode() + b":")
    at = at[_BEFORE_EVENT[data[at - 1]]]  # at 0 that is the padding behind the block
    line = block.line_of(at)
    end = block.ends[line]
    # Before it, from right to left: `kvm:` of perf, blanks, a colon, and the time.
    prefix = np.where(data[at - 1] == _COLON, at - len(event.system) - 1, at)
    stop = np.maximum(scan.skip_back(data, prefix, b" ", TIME_WIDTH) - 1, 0)
    start = scan.skip_back(data, stop, b"0123456789.", TIME_WIDTH)
    times, has_point = scan.fixed_point(data, start, stop)
    found = times.ok & (data[stop] == _COLON)
    _refuse(block, line, ~found, "has no time before the event; take the tool's usual form of a line (no --ts-diff, no -F)")
    _refuse(block, line, ~has_point, "has a time that counts no seconds; trace with a clock that does (trace_clock mono or local)")
    fields: Fields = {}
    for field, parse in event.fields.items():
        literal = f" {field} ".encode()
        place, there = scan.next_in_line(scan.find(block.data, literal), at, end)
        fields[field] = parse(block, np.where(there, place + len(literal), 0), end)
        _refuse(block, line, ~(there & fields[field].ok), f"has no {field!r} as {name} prints it")
    return line, times.value.astype(np.int64), fields


def _refuse(block: Block, line: Positions, bad: Mask, why: str) -> None:
    wrong = np.flatnonzero(bad)
    if len(wrong):
        raise block.error(int(line[wrong[0]]), why)


def _hex(block: Block, start: Positions, end: Positions) -> Numbers:
    return scan.hexadecimal(block.data, start, scan.skip(block.data, start, b"0123456789abcdefx", scan.MAX_NIBBLES + 2))


def _decimal(block: Block, start: Positions, end: Positions) -> Numbers:
    return scan.decimal(block.data, start, scan.skip(block.data, start, b"0123456789", scan.MAX_DECIMALS))


def _flags(block: Block, start: Positions, end: Positions) -> Numbers:
    """Parse the letters of an error code; the value has PFERR_WRITE if W is among them."""
    stop = scan.skip(block.data, start, b"PWUKSGXRVDF|0123456789abcdefx", 32)
    letters = np.flatnonzero(block.data == ord("W"))
    writes = np.searchsorted(letters, stop) > np.searchsorted(letters, start)
    return Numbers(np.where(writes, PFERR_WRITE, np.uint64(0)), block.data[stop] == _BLANK)


def _fault(address: str) -> Callable[[Fields], tuple[Mask, Uint64Array]]:
    return lambda f: (f["error_code"].value & PFERR_WRITE != 0, f[address].value >> PAGE_SHIFT)


def _writable(spte: Uint64Array) -> Mask:
    writable: Mask = (spte & WRITABLE == WRITABLE) & (spte & MMIO_MASK != MMIO_MASK)
    return writable


RING = "kvm_dirty_ring_push"
EVENTS = {
    "kvm_page_fault": Event(b"kvm", {"address": _hex, "error_code": _hex}, _fault("address")),
    "fast_page_fault": Event(b"kvmmmu", {"gva": _hex, "error_code": _flags}, _fault("gva")),
    "kvm_mmu_set_spte": Event(
        b"kvmmmu", {"gfn": _hex, "spte": _hex, "level": _decimal}, lambda f: (_writable(f["spte"].value), f["gfn"].value)
    ),
    "kvm_tdp_mmu_spte_changed": Event(
        b"kvmmmu",
        {"gfn": _hex, "level": _decimal, "old_spte": _hex, "new_spte": _hex},
        lambda f: (_writable(f["new_spte"].value) & ~_writable(f["old_spte"].value), f["gfn"].value),
    ),
    RING: Event(b"kvm", {"slot": _decimal, "offset": _hex}, lambda f: (np.ones(len(f["offset"].value), np.bool_), f["offset"].value)),
}
