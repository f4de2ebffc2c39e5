"""Scenarios with an L2 guest: patch 6, and what patch 11 does while L2 runs."""

from __future__ import annotations

import numpy as np

from spte.access import READ
from spte.guest_tables import GuestTables
from spte.patches.states import around
from spte.patches.trial import Play, Scenario, Slot, Trial

PML_ENTRIES, PML_FULL_INDEX = 512, 0xFFFF
TABLES_GFN, TABLES_PAGES = 1 << 18, 16
L2_BASE = 1 << 16  # where L2 sees the pages of a slot


def _l2_on(t: Trial, slot: Slot) -> GuestTables:
    """Give L1 an EPT that shows L2 the pages of `slot` from L2_BASE on."""
    memory = t.slot("4k", TABLES_PAGES, gfn=TABLES_GFN).backing
    tables = GuestTables(memory, TABLES_GFN << 12, "ept")
    tables.map(L2_BASE, slot.gfn, slot.npages)
    return tables


def _alias(t: Trial) -> None:
    """L2 sees page G of a slot of three pages at G+1 and G+2, and writes those: what is reported of pages 0, 1, 2."""
    slot = t.slot("4k", 3)
    tables = GuestTables(t.slot("4k", TABLES_PAGES, gfn=TABLES_GFN).backing, TABLES_GFN << 12, "ept")
    for alias in (1, 2):
        tables.map(slot.gfn + alias, slot.gfn)
    t.vm.vcpus[0].enter_l2(tables.address())
    t.write(slot.gfns[1:])
    slot.log(True)
    reported = []
    with t.whole():
        for alias in (1, 2):
            t.write(slot.gfns[alias : alias + 1])
            reported.append(_pages(t, slot))
    t.vm.vcpus[0].leave_l2()
    t.seen["reported"] = tuple(page for pages in reported for page in pages)


def _pages(t: Trial, slot: Slot) -> list[int]:
    bits = np.unpackbits(t.vm.get_dirty_log(slot.number).view(np.uint8), bitorder="little")
    return [int(page) for page in np.flatnonzero(bits)]


def _forced_full(t: Trial) -> None:
    """L2 needs an A bit set while the hardware, against KVM's will, logs and has a full buffer."""
    slot = t.slot("4k", 16)
    tables = _l2_on(t, slot)
    vcpu = t.vm.vcpus[0]
    vcpu.enter_l2(tables.address())
    stop = vcpu.run([L2_BASE], [READ], leave=False)  # maps the neighbours too, without A
    assert stop is None, stop
    vcpu.arrays.vcpu[0].pml_enabled, vcpu.arrays.vcpu[0].pml_index = 1, PML_FULL_INDEX
    with t.after():
        stop = vcpu.read([L2_BASE + 1])
    t.seen["exit"] = stop.reason if stop is not None else "none"
    vcpu.leave_l2()


def _l2_writes(*, ept: bool) -> Play:
    """Return a play in which L2 has 600 pages mapped, by an EPT of L1 or without, logging begins, and L2 writes each."""

    def play(t: Trial) -> None:
        slot = t.slot("4k", 600)
        tables = _l2_on(t, slot)
        vcpu = t.vm.vcpus[0]
        vcpu.enter_l2(tables.address() if ept else None)
        gfns = np.arange(L2_BASE, L2_BASE + slot.npages) if ept else slot.gfns
        t.write(gfns)
        slot.log(True)
        with t.after():
            t.write(gfns)
        vcpu.leave_l2()
        t.seen |= {"pml_full_exits": t.vm.counters()["pml_full"], "reported": len(_pages(t, slot))}

    return play


def _toggled_in_l2(*, ends: bool) -> Play:
    """Return a play in which logging begins while L2 runs and, `ends`, ends again; then the vCPU goes back to L1."""

    def play(t: Trial) -> None:
        slot = t.slot("4k", 64)
        tables = _l2_on(t, slot)
        vcpu = t.vm.vcpus[0]
        vcpu.enter_l2(tables.address())
        controls, deferred = [], []
        with t.step():
            slot.log(True)
            t.write([L2_BASE])
            if ends:
                slot.log(False)
                t.write([L2_BASE])
            controls.append(int(vcpu.pml01))
            deferred.append(int(vcpu.nested.update_deferred))
            vcpu.leave_l2()
            vcpu.enter_guest()
            controls.append(int(vcpu.pml01))
            deferred.append(int(vcpu.nested.update_deferred))
        t.seen |= {"pml_on": tuple(controls), "deferred": tuple(deferred)}

    return play


PATCH_6 = [
    Scenario(
        "P6-a", "L2 writes G+1, then G+2, both aliases of page G of L1: pages reported", around(6), _alias, {"reported": (None, (0, 0))},
        platform="ept-pml",
    ),
    Scenario("P6-b", "a PML-full exit is forced in L2", around(6), _forced_full, {"exit": (None, "internal_error")}, platform="ept-pml"),
    Scenario(
        "P6-c", "L2 writes 600 distinct pages", around(6), _l2_writes(ept=True),
        {"faults_after": (None, 600), "pml_full_exits": (None, 0), "pml_entries": (None, 0), "reported": (600, 600)}, platform="ept-pml",
    ),
    Scenario(
        "P6-c no EPT", "the same without EPT of L1, where A/D bits are off: lost until 2673dfb591a3 (6.9) write-protects",
        around(6, l2_root_write_protect=True), _l2_writes(ept=False),
        {"faults_after": (0, 0, 600), "pml_full_exits": (0, 0, 0), "pml_entries": (0, 0, 0), "reported": (0, 0, 600)},
        platform="ept-pml",
    ),
]  # fmt: skip
PATCH_11 = [
    Scenario(
        "P11-c", "logging begins while L2 runs: PML of vmcs01 before and after the exit to L1", around(11), _toggled_in_l2(ends=False),
        {"pml_on": ((1, 1), (0, 1)), "deferred": ((0, 0), (1, 0)), "pml_requests": (0, 1)}, platform="ept-pml",
    ),
    Scenario(
        "P11-c end", "the same, and logging ends before the exit", around(11), _toggled_in_l2(ends=True),
        {"pml_on": ((1, 1), (0, 0)), "deferred": ((0, 0), (1, 0)), "pml_requests": (0, 2)}, platform="ept-pml",
    ),
]  # fmt: skip
