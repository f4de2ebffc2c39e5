"""Scenarios of patches 9 to 13: when PML is on, which vCPUs are told, and what changing a memslot's flags may do."""

from __future__ import annotations

import errno
import itertools

from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.errors import KvmError
from spte.patches import nested as patch_nested
from spte.patches.mapping import logging_begins
from spte.patches.states import around
from spte.patches.trial import Play, Scenario, Slot, Trial

PML_ENTRIES = 512
_SMALL = 64  # pages of a slot where only its flags matter
_MANY = 1024


def _refusal(slot: Slot, flags: int) -> str:
    try:
        slot.set(flags)
    except KvmError as error:
        return errno.errorcode[error.code]
    return "none"


# -- patch 9


def _harvest_with_two_vcpus(t: Trial) -> None:
    slot = t.slot("4k", _SMALL, flags=LOG_DIRTY_PAGES)
    for vcpu in range(2):
        t.write(slot.gfns, vcpu)
    with t.step():
        slot.harvest()
    t.seen["vcpu_kicks"] = t.vm.counters()["vcpu_kicks"]


# -- patch 10


def _same_flags(t: Trial) -> None:
    slot = t.slot("4k", _SMALL, flags=LOG_DIRTY_PAGES)
    t.write(slot.gfns)
    with t.step():
        slot.set(LOG_DIRTY_PAGES)
    t.seen["logging_slots"] = t.vm.nr_memslots_dirty_logging


def _toggle_readonly(t: Trial) -> None:
    writable, readonly = t.slot("4k", _SMALL), t.slot("4k", _SMALL, gfn=_SMALL, flags=READONLY)
    with t.step():
        t.seen["made_readonly"] = _refusal(writable, READONLY)
        t.seen["made_writable"] = _refusal(readonly, 0)


def _toggle_log_of_readonly(t: Trial) -> None:
    slot = t.slot("4k", _SMALL, flags=READONLY)
    stop = t.vm.vcpus[0].read(slot.gfns)
    assert stop is None, stop
    with t.step():
        slot.set(READONLY | LOG_DIRTY_PAGES)
        counts = [t.vm.nr_memslots_dirty_logging]
        slot.set(READONLY)
        counts.append(t.vm.nr_memslots_dirty_logging)
    t.seen["logging_slots"] = tuple(counts)


# -- patch 11


def _three_slots(t: Trial) -> None:
    slots = [t.slot("4k", _SMALL, gfn=i * _SMALL) for i in range(3)]
    t.seen["pml_on_before"] = t.pml_on()
    requests, counts = [t.vm.counters()["cpu_dirty_logging_requests"]], []
    with t.step():
        for on in (True, False):
            for slot in slots:
                slot.log(on)
                requests.append(t.vm.counters()["cpu_dirty_logging_requests"])
                counts.append(t.vm.nr_memslots_dirty_logging)
    t.seen["requests"] = tuple(b - a for a, b in itertools.pairwise(requests))
    t.seen["logging_slots"] = tuple(counts)


def _create_and_delete(t: Trial) -> None:
    with t.step():
        slot = t.slot("4k", _SMALL, flags=LOG_DIRTY_PAGES)
        counts, controls = [t.vm.nr_memslots_dirty_logging], [t.pml_on()]
        slot.delete()
        counts.append(t.vm.nr_memslots_dirty_logging)
        controls.append(t.pml_on())
    t.seen |= {"logging_slots": tuple(counts), "pml_on": tuple(controls)}


def _first_entry(t: Trial) -> None:
    slot = t.slot("4k", _SMALL)
    t.write(slot.gfns)
    slot.log(True)
    with t.after():
        t.write(slot.gfns, vcpu=1)
    t.seen["pml_on"] = t.pml_on(1)


def _move(t: Trial) -> None:
    slot = t.slot("4k", _SMALL, flags=LOG_DIRTY_PAGES)
    with t.step():
        slot.set(LOG_DIRTY_PAGES, gfn=_MANY)
    t.seen |= {"logging_slots": t.vm.nr_memslots_dirty_logging, "pml_on": t.pml_on()}


def _without_pml(t: Trial) -> None:
    slot = t.slot("4k", _SMALL)
    t.write(slot.gfns)
    with t.step():
        slot.log(True)
        on = t.pml_on()
        slot.log(False)
    t.seen["pml_on"] = on


# -- patches 12 and 13


def _last_slot_ends(t: Trial) -> None:
    slot = t.slot("4k", _MANY, flags=LOG_DIRTY_PAGES)
    t.write(slot.gfns)
    slot.harvest()
    with t.step():
        slot.log(False)
    with t.after():
        t.write(slot.gfns)


def _neighbour_logs(npages: int) -> Play:
    """Two slots log and are harvested; one goes on, the guest writes `npages` of the other."""

    def play(t: Trial) -> None:
        a, b = (t.slot("4k", _MANY, gfn=i * _MANY, flags=LOG_DIRTY_PAGES) for i in range(2))
        for slot in (a, b):
            t.write(slot.gfns)
            slot.harvest()
        with t.step():
            b.log(False)
        with t.after():
            t.write(b.gfns[:npages])
        first = t.vm.counters()
        t.write(b.gfns[:npages])
        t.seen |= {
            "pml_full_exits": first["pml_full"], "second_pass_entries": t.vm.counters()["pml_entries"] - first["pml_entries"],
            "reported_of_a": a.harvest(), "log_of_b": _log_of(b),
        }  # fmt: skip

    return play


def _log_of(slot: Slot) -> str:
    try:
        slot.harvest()
    except KvmError as error:
        return errno.errorcode[error.code]
    return "present"


_LINKS = 1 + 1 + _MANY // 512  # entries without D that lead to the leaves of a slot: of level 4, 3 and 2
SCENARIOS = {
    6: patch_nested.PATCH_6,
    9: [
        Scenario(
            "P9-a", "no PML, 2 vCPUs in the guest, GET; then with the early return", around(9, sync_kicks_without_pml=False),
            _harvest_with_two_vcpus, {"vcpu_kicks": (0, 2, 0)}, vcpus=2,
        ),
    ],
    10: [
        Scenario(
            "P10-a", "the same flags again: no hook", around(10), _same_flags,
            {"sptes_written": (0, 0), "flushes": (0, 0), "pml_requests": (0, 0), "logging_slots": (1, 1)}, platform="ept-pml",
        ),
        Scenario(
            "P10-b", "READONLY toggled, both ways", around(10), _toggle_readonly,
            {"made_readonly": ("EINVAL", "EINVAL"), "made_writable": ("EINVAL", "EINVAL")}, platform="ept-pml",
        ),
        Scenario(
            "P10-c", "logging of a READONLY slot on and off; requests with patch 11", around(11), _toggle_log_of_readonly,
            {"sptes_written": (0, 0), "flushes": (0, 0), "pml_requests": (0, 2), "logging_slots": ((1, 0), (1, 0))}, platform="ept-pml",
        ),
    ],
    11: [
        Scenario(
            "P11-a", "three slots begin, then end to log", around(11), _three_slots,
            {
                "pml_requests": (0, 2), "requests": ((0,) * 6, (1, 0, 0, 0, 0, 1)), "logging_slots": ((1, 2, 3, 2, 1, 0),) * 2,
                "pml_on_before": (1, 0),
            },
            platform="ept-pml",
        ),
        Scenario(
            "P11-b", "a slot is created with logging, then deleted", around(11), _create_and_delete,
            {"pml_requests": (0, 2), "logging_slots": ((1, 0), (1, 0)), "pml_on": ((1, 1), (1, 0))}, platform="ept-pml",
        ),
        *patch_nested.PATCH_11,
        Scenario(
            "P11-d", "a vCPU enters first after logging began", around(11), _first_entry, {"pml_on": (1, 1), "pml_entries": (64, 64)},
            platform="ept-pml", vcpus=2,
        ),
        Scenario(
            "P11-e", "a slot that logs is moved", around(11), _move,
            {"pml_requests": (0, 0), "logging_slots": (1, 1), "pml_on": (1, 1)}, platform="ept-pml",
        ),
        Scenario("P11-f", "no PML hardware", around(11), _without_pml, {"pml_requests": (0, 0), "pml_on": (0, 0)}),
    ],
    12: [
        Scenario(
            "P12-a", "1024 leaves with D clear, the last slot ends to log", around(12), _last_slot_ends,
            {"sptes_written": (_MANY + _LINKS, 0), "flushes": (1, 0), "zapped": (0, 0), "pml_entries": (0, 0)}, platform="ept-pml",
        ),
        Scenario(
            "P12-b", "slot A logs on, B not: its 300 leaves with D clear are written", around(12), _neighbour_logs(300),
            {"pml_entries": (0, 300), "second_pass_entries": (0, 0), "reported_of_a": (0, 0), "log_of_b": ("ENOENT", "ENOENT")},
            platform="ept-pml",
        ),
        Scenario(
            "P12-c", "the same with 513 leaves", around(12), _neighbour_logs(PML_ENTRIES + 1),
            {"pml_entries": (0, 513), "pml_full_exits": (0, 1), "second_pass_entries": (0, 0)}, platform="ept-pml",
        ),
    ],
    13: [
        Scenario(
            "P13", "2 huge and 256 4K leaves, logging begins: D of all, W of the huge", around(13), logging_begins("thp", 1280),
            {"sptes_written": (260, 260), "flushes": (2, 2)}, platform="ept-pml",
        ),
    ],
}  # fmt: skip
"""By patch."""
