"""Tracepoints: what happened inside an operation, under the kernel's names; off unless asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from spte.arrays.tables import Tables
from spte.arrays.vcpu import (
    EV_FAST,
    EV_FAULT,
    EV_MARK,
    EV_MMIO,
    EV_PML,
    EV_PML_FULL,
    EV_PUSH,
    EV_RING_EXIT,
    EV_SET,
    EV_SPTE,
    EXEC,
    WRITE,
    Vcpu,
)
from spte.bits import PFN_MASK
from spte.kernel_bits import KernelBits

PFERR_PRESENT, PFERR_WRITE, PFERR_USER, PFERR_FETCH = 1, 2, 4, 16


def _flags(bits: KernelBits | None, spte: int) -> str:
    return f"{(spte if bits is None else bits.spte(spte)) & ~int(PFN_MASK):x}"


def _decode(vcpu: int, e: list[int], bits: KernelBits | None) -> list[Any] | None:
    """Return one logged event as ``[tracepoint, fields...]``; None for what is hardware's, not KVM's."""
    kind, a, b, c, d, f = e
    if kind == EV_FAULT:
        error = PFERR_USER | (PFERR_PRESENT if c else 0) | {WRITE: PFERR_WRITE, EXEC: PFERR_FETCH}.get(b, 0)
        return ["kvm_page_fault", vcpu, a, f"{error:x}"]
    if kind == EV_FAST:
        return ["fast_page_fault", vcpu, a, _flags(bits, b), _flags(bits, c), "fixed" if d else "no"]
    if kind == EV_SET:
        return ["kvm_mmu_set_spte", a, b, _flags(bits, c)]
    if kind == EV_SPTE:
        return ["kvm_tdp_mmu_spte_changed", 0, a, b, _flags(bits, c), _flags(bits, d)]
    if kind == EV_MARK:
        return ["mark_page_dirty_in_slot", a]
    if kind == EV_PML_FULL:
        return ["kvm_pml_full", vcpu]
    if kind == EV_PUSH:
        return ["kvm_dirty_ring_push", vcpu, a, b, c, d, f]
    if kind == EV_RING_EXIT:
        return ["kvm_dirty_ring_exit", vcpu]
    if kind == EV_MMIO:
        return ["mark_mmio_spte", a]
    return None


class EventLog:
    """Events and the hardware's PML log of one VM, in order."""

    def __init__(self) -> None:
        self.events: list[list[Any]] = []
        self.hw: list[list[Any]] = []
        self.tracing = False
        self.bits: KernelBits | None = None  # how the kernel has the entries; None: as the arena
        self.hardware = False

    @property
    def on(self) -> bool:
        """Anything is recorded."""
        return self.tracing or self.hardware

    def collect(self, index: int, v: Vcpu) -> None:
        """Take over what a vCPU logged during a run in the guest."""
        for e in v.log[: v.vcpu[0].logged].tolist():
            if self.hardware and e[0] == EV_PML:
                self.hw.append(["pml", e[1], e[2], e[3], "setA" if e[4] else ""])
            elif self.hardware and e[0] == EV_PML_FULL:
                self.hw.append(["pml_full", e[1], e[2], e[3]])
            if self.tracing and (event := _decode(index, e, self.bits)):
                self.events.append(event)
        v.vcpu[0].logged = 0

    def ring_reset(self, index: int, v: Vcpu) -> None:
        """Record that a vCPU's ring was reset."""
        if self.tracing:
            dirty, reset = int(v.vcpu[0].dirty_index), int(v.vcpu[0].reset_index)
            self.events.append(["kvm_dirty_ring_reset", index, dirty, reset, (dirty - reset) & 0xFFFF_FFFF])

    def drain_events(self) -> list[list[Any]]:
        """Return the events and forget them."""
        events, self.events = self.events, []
        return events

    def drain_hw(self) -> list[list[Any]]:
        """Return what the hardware logged and forget it."""
        hw, self.hw = self.hw, []
        return hw

    @contextlib.contextmanager
    def changes(self, t: Tables) -> Iterator[None]:
        """Record every entry that an operation changes in tables that outlive it, ascending by gfn; only while `tracing`: it copies."""
        n = int(t.kvm[0].rows)
        sptes, level, gfn = t.sptes[:n].copy(), t.pages["level"][:n].copy(), t.pages["gfn"][:n].copy()
        yield
        same = (t.pages["level"][:n] == level) & (t.pages["gfn"][:n] == gfn) & (level > 0)
        rows, places = np.nonzero((t.sptes[:n] != sptes) & same[:, None])
        found = []
        for r, i in zip(rows.tolist(), places.tolist(), strict=True):
            at = int(gfn[r]) + (i << (9 * (int(level[r]) - 1)))
            found.append((at, int(level[r]), _flags(self.bits, int(sptes[r, i])), _flags(self.bits, int(t.sptes[r, i]))))
        self.events += [["kvm_tdp_mmu_spte_changed", 0, *change] for change in sorted(found, key=lambda c: (c[0], -c[1]))]
