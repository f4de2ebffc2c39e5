"""Counters of a VM by name: KVM's statistics, and the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spte.arrays.tables import Tables
from spte.arrays.vcpu import Vcpu

VM_STATS: dict[str, str | tuple[str, int]] = {
    "pages_4k": ("pages", 0), "pages_2m": ("pages", 1), "pages_1g": ("pages", 2), "remote_tlb_flush_requests": "remote_tlb_flush_requests",
    "nx_lpage_splits": "nx_lpage_splits",
}  # fmt: skip
VCPU_STATS = ("pf_taken", "pf_fixed", "pf_fast", "pf_emulate", "pf_spurious", "pf_mmio_spte_created", "exits")
# What recordings hold of each file; exits stand in a field of their own.
RECORDED_STATS = {"vm": tuple(VM_STATS), "vcpu": tuple(name for name in VCPU_STATS if name != "exits")}
_TABLE_COUNTERS: dict[str, str | tuple[str, int]] = {
    "sptes_written": "sptes_written", "splits_2m": ("splits", 1), "splits_1g": ("splits", 2), "zapped": "zapped", "collapsed": "collapsed",
    "dirty_marks": "dirty_marks", "flushes": "remote_tlb_flush_requests", "cpu_dirty_logging_requests": "cpu_dirty_logging_requests",
    "vcpu_kicks": "vcpu_kicks",
}  # fmt: skip
_VCPU_COUNTERS: dict[str, str | tuple[str, int]] = {
    "pml_entries": "pml_entries", "pml_full": "pml_fulls", "exits": "exits", "faults_fast": "pf_fast", "faults_slow": "slow_faults",
    "ring_full": "ring_fulls", "ept_violations": "violations", "ept_misconfigs": "misconfigs",
}  # fmt: skip


def _value(record: Any, field: str | tuple[str, int]) -> int:
    return int(record[field] if isinstance(field, str) else record[field[0]][field[1]])


def stat_files(t: Tables, vcpus: Sequence[Vcpu]) -> dict[str, dict[str, int]]:
    """Return KVM's binary statistics, a dict a file descriptor: ``vm``, ``vcpu0``, ..., in the kernel's names."""
    found = {"vm": {name: _value(t.kvm[0], field) for name, field in VM_STATS.items()}}
    for index, v in enumerate(vcpus):
        found[f"vcpu{index}"] = {name: int(v.vcpu[0][name]) for name in VCPU_STATS}
    return found


def stats(t: Tables, vcpus: Sequence[Vcpu]) -> dict[str, Any]:
    """Return the statistics by name, vCPUs added up as debugfs does, and beside them each file of `stat_files`."""
    files = stat_files(t, vcpus)
    summed = {name: sum(file[name] for who, file in files.items() if who != "vm") for name in VCPU_STATS}
    return {**files["vm"], **summed, **files}


def counters(t: Tables, vcpus: Sequence[Vcpu]) -> dict[str, int]:
    """Return the model's own counts, vCPUs added up."""
    found = {name: _value(t.kvm[0], field) for name, field in _TABLE_COUNTERS.items()}
    found |= {name: sum(_value(v.vcpu[0], field) for v in vcpus) for name, field in _VCPU_COUNTERS.items()}
    return found
