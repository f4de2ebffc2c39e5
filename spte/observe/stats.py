"""Counters of a VM by name: KVM's statistics, and the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spte.arrays import context as cx

if TYPE_CHECKING:
    from spte.vm.observable import Observable

VM_STATS = {
    "pages_4k": cx.PAGES_4K, "pages_2m": cx.PAGES_2M, "pages_1g": cx.PAGES_1G, "remote_tlb_flush_requests": cx.FLUSHES,
    "nx_lpage_splits": cx.NX_SPLITS,
}  # fmt: skip
VCPU_STATS = {
    "pf_taken": cx.PF_TAKEN, "pf_fixed": cx.PF_FIXED, "pf_fast": cx.PF_FAST, "pf_emulate": cx.PF_EMULATE, "pf_spurious": cx.PF_SPURIOUS,
    "pf_mmio_spte_created": cx.PF_MMIO_SPTE_CREATED, "exits": cx.EXITS,
}  # fmt: skip
# What recordings hold of each file; exits stand in a field of their own.
RECORDED_STATS = {"vm": tuple(VM_STATS), "vcpu": tuple(name for name in VCPU_STATS if name != "exits")}
_TABLE_COUNTERS = {
    "sptes_written": cx.SPTES_WRITTEN, "splits_2m": cx.SPLITS_2M, "splits_1g": cx.SPLITS_1G, "zapped": cx.ZAPPED, "collapsed": cx.COLLAPSED,
    "dirty_marks": cx.DIRTY_MARKS, "flushes": cx.FLUSHES, "cpu_dirty_logging_requests": cx.CPU_DIRTY_LOGGING_REQUESTS,
    "vcpu_kicks": cx.VCPU_KICKS,
}  # fmt: skip
_VCPU_COUNTERS = {
    "pml_entries": cx.PML_ENTRIES, "pml_full": cx.PML_FULLS, "exits": cx.EXITS, "faults_fast": cx.PF_FAST, "faults_slow": cx.SLOW_FAULTS,
    "ring_full": cx.RING_FULLS, "ept_violations": cx.VIOLATIONS, "ept_misconfigs": cx.MISCONFIGS,
}  # fmt: skip


def stat_files(vm: Observable) -> dict[str, dict[str, int]]:
    """Return KVM's binary statistics, a dict a file descriptor: ``vm``, ``vcpu0``, ..., in the kernel's names."""
    found = {"vm": {name: int(vm.mmu.tables.meta[i]) for name, i in VM_STATS.items()}}
    for vcpu in vm.vcpus:
        found[f"vcpu{vcpu.index}"] = {name: int(vcpu.arrays.stat[i]) for name, i in VCPU_STATS.items()}
    return found


def stats(vm: Observable) -> dict[str, Any]:
    """Return the statistics by name, vCPUs added up as debugfs does, and beside them each file of `stat_files`."""
    files = stat_files(vm)
    summed = {name: sum(file[name] for who, file in files.items() if who != "vm") for name in VCPU_STATS}
    return {**files["vm"], **summed, **files}


def counters(vm: Observable) -> dict[str, int]:
    """Return the model's own counts, vCPUs added up."""
    found = {name: int(vm.mmu.tables.meta[i]) for name, i in _TABLE_COUNTERS.items()}
    found |= {name: sum(int(vcpu.arrays.stat[i]) for vcpu in vm.vcpus) for name, i in _VCPU_COUNTERS.items()}
    return found
