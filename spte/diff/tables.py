"""The page tables of a VM as values that can be compared: digests of all entries, and leaves as runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.bits import LARGE, MMU_PRESENT, PFN_MASK, SUPPRESS_VE
from spte.observe import listing
from spte.platform import EPT
from spte.vm.vm import VM


class Leaf(NamedTuple):
    """Neighbouring leaves of one level with equal bits; `bits` are those of the model's one layout, without frame and suppress-#VE."""

    level: int
    gfn: int
    entries: int
    bits: int

    def __str__(self) -> str:
        return f"level {self.level}, {self.entries:,} from gfn {self.gfn:#x}, bits {self.bits:x}"


def digest(vm: VM) -> bytes:
    """Return a digest of every entry of the first vCPU's tables; two VMs that agree map alike.

    Frames are left out, and suppress-#VE, which kernels from 6.10 on set in every entry of EPT and in those of NPT that are not present.
    """
    found = hashlib.blake2b(digest_size=16)
    for entries in _tables(vm, _root(vm)):
        suppressed = SUPPRESS_VE if vm.platform.paging == EPT else np.where(entries & MMU_PRESENT, np.uint64(0), SUPPRESS_VE)
        found.update((entries & ~suppressed).tobytes())
    return found.digest()


def leaves(vm: VM) -> list[Leaf]:
    """Return the leaves of the first vCPU's tables, ascending."""
    walked = listing.walk(vm.mmu.tables, _root(vm))
    shown = ~(int(SUPPRESS_VE) if vm.platform.paging == EPT else 0)
    return [Leaf(run.level, run.gfn, run.entries, run.value & shown) for run in walked if run.what == "leaf"]


def _root(vm: VM) -> int:
    return int(vm.vcpus[0].arrays.vcpu[0].root)


def _tables(vm: VM, row: int) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the entries of each table below `row`, itself included, without frames."""
    if row < 0:
        return
    tables = vm.mmu.tables
    entries = tables.sptes[row]
    yield entries & ~PFN_MASK
    if tables.pages[row].level > 1:
        links = entries[(entries & MMU_PRESENT != 0) & (entries & LARGE == 0)]
        for link in (links & PFN_MASK).tolist():
            yield from _tables(vm, link >> 12)
