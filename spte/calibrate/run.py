"""A cost profile of this host: steps that are timed several times, solved for its items; what they do not show is a guess."""

from __future__ import annotations

import datetime as dt
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from spte.calibrate import steps
from spte.calibrate.steps import PAGES, Bench
from spte.cost import CostProfile, Costs, Origin, load
from spte.cost.costs import ITEMS
from spte.devkvm.device import HostMemory, NoKvmError, open_kvm
from spte.devkvm.host import Host, host
from spte.errors import KvmError
from spte.platform import PAGE_SIZE, SHADOW, Platform
from spte.replay.guest import UnsupportedOp
from spte.replay.machine import Machine
from spte.trace import PAGES_PER_2M

REPEATS = 7
GUESS = "guess"  # the profile that gives what can not be measured
RING_BYTES = 65536 * 16
PML_ENTRIES = 512
Samples = dict[str, list[float]]
HOW = {
    "exit": "CPUID in the guest", "fast_fault": "writes of write-protected pages", "slow_fault_shared": "first writes of pages",
    "slow_fault_exclusive": "first writes of pages, and writes of write-protected ones", "pml_log": "writes of clean pages",
    "bitmap_word": "enabling of a slot of 8 GiB", "get_word": "GET of a clean slot of 8 GiB",
    "mask_walk": "GET of one dirty page in 64, less clear_page", "clear_page": "GET and CLEAR of 64 dirty pages in 64; enabling",
    "collapse_2m": "disabling, 2 MiB pages mapped by 4 KiB, less zap", "zap": "disabling, 2 MiB pages mapped by 4 KiB",
    "ring_push": "writes with a ring, less those with a bitmap",
}  # fmt: skip


def measure(at: Host, kvm: int, repeats: int, progress: Callable[[int], None]) -> Samples:
    """Return the samples of every item that the steps show, ns.

    Parameters
    ----------
    at : Host
        What stands for the host in the model.
    kvm : int
        Descriptor of /dev/kvm.
    repeats : int
        How often each step is timed.
    progress : callable
        Called with the number of each repeat, from 0.
    """
    machine = Machine(at.header)
    fast = machine.policy.fast_page_fault or not machine.platform.tdp_mmu
    memory, huge = (HostMemory(PAGES * PAGE_SIZE, huge=wanted) for wanted in (False, True))
    for each in (memory, huge):
        each.fill(0, 0)
    large, small = HostMemory(steps.LARGE_WORDS * 64 * PAGE_SIZE, huge=False), HostMemory(64 * PAGE_SIZE, huge=False)
    bitmap, ring = Bench(at, kvm), Bench(at, kvm, RING_BYTES)
    found: Samples = {}
    try:
        for repeat in range(repeats):
            progress(repeat)
            exit_ns, logged = steps.exit_ns(bitmap, memory), steps.logging_ns(bitmap, memory)
            words, enabled = steps.words_ns(bitmap, large, small), steps.enable_ns(bitmap, memory)
            disabled, pushed = steps.disable_ns(bitmap, huge) if at.thp else None, steps.ring_ns(ring, memory)
            solved = solve(machine.platform, exit_ns, logged, words, enabled, disabled, pushed, fast=fast)
            for item, values in solved.items():
                found.setdefault(item, []).extend(values)
    finally:
        bitmap.close()
        ring.close()
    return found


def solve(
    platform: Platform, exit_ns: float, logged: dict[str, float], words: dict[str, float], enabled: float, disabled: float | None,
    pushed: float, *, fast: bool,
) -> Samples:  # fmt: skip
    """Return the cost of items, ns, each clipped at 0; arguments are what the functions of `steps` return.

    Which item a fault is depends on the platform: a write of an armed page is logged by the CPU with PML, mended without mmu_lock if
    `fast`, and a fault like the first one under shadow paging. An exit is no longer than a fault, which holds one: where nothing
    but the instruction's emulation is slow, the fault tells.
    """
    faults = [logged["first"], *([] if platform.pml else [logged["armed"]])]
    exit_ns = min(exit_ns, *faults)
    slow = "slow_fault_shared" if platform.tdp_mmu else "slow_fault_exclusive"
    clear = (logged["dense"] - logged["sparse"]) / 63
    walk = logged["sparse"] - clear
    found = {
        "exit": [exit_ns], slow: [logged["first"] - exit_ns], "bitmap_word": [words["enable"]], "get_word": [words["get"]],
        "clear_page": [clear, (logged["cleared"] - walk) / 64, enabled], "mask_walk": [walk], "ring_push": [pushed - logged["armed"]],
    }  # fmt: skip
    if platform.pml:
        found["pml_log"] = [logged["armed"] - exit_ns / PML_ENTRIES]
    elif fast and platform.paging != SHADOW:
        found["fast_fault"] = [logged["armed"] - exit_ns]
    else:
        found[slow].append(logged["armed"] - exit_ns)
    if disabled is not None:
        found |= {"collapse_2m": [disabled]} if platform.tdp_mmu else {"zap": [disabled / PAGES_PER_2M]}
    return {item: [max(0.0, value) for value in values] for item, values in found.items()}


def calibrate(repeats: int = REPEATS, progress: Callable[[int], None] = lambda repeat: None) -> tuple[CostProfile, Host]:
    """Measure this host.

    Parameters
    ----------
    repeats : int
        How often each step is timed, 1 or more: a cost is the median, its band from the least to the most.
    progress : callable, optional
        Called with the number of each repeat, from 0.

    Returns
    -------
    tuple of CostProfile and Host
        The costs, and what stands for the host. Items that no step shows are those of the profile ``guess``, and so is every item
        where neither VMX nor SVM is behind the KVM: its costs are no processor's.

    Raises
    ------
    NoKvmError
        This host has no KVM that can be used.
    """
    kvm = open_kvm()
    try:
        at = host()
        samples = measure(at, kvm, repeats, progress)
    except (KvmError, UnsupportedOp) as error:
        raise NoKvmError(f"the host's KVM refuses a step: {error}") from None
    finally:
        os.close(kvm)
    return profile(at, samples), at


def profile(at: Host, samples: Samples) -> CostProfile:
    """Return the cost profile that `samples` of `measure` give."""
    rest = load(GUESS)
    if "collapse_2m" in samples:  # zap is the guess then
        leaves = rest.costs.zap * PAGES_PER_2M
        samples = {**samples, "collapse_2m": [max(0.0, ns - leaves) for ns in samples["collapse_2m"]]}
    today, machine = dt.date.today().isoformat(), f"Linux {at.kernel}, {_cpu()}, {at.config}"
    columns: list[dict[str, float]] = [{}, {}, {}]
    origins = {}
    for item in ITEMS:
        values = samples.get(item)
        if values is None:
            origins[item] = rest.origins[item]
            taken = [getattr(costs, item) for costs in (rest.costs, rest.low, rest.high)]
        else:
            source = f"spte calibrate: {HOW[item]}"
            origins[item] = Origin(f"{source}, on a software backend" if at.user_mode else source, today, machine, guess=at.user_mode)
            taken = [statistics.median(values), min(values), max(values)]
        for column, ns in zip(columns, taken, strict=True):
            column[item] = ns
    costs, low, high = (Costs(**column) for column in columns)
    return CostProfile("calibrated", f"{machine}, measured by spte calibrate", costs, low, high, origins)


def _cpu() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "a processor without a name"
