"""Leaves, tables and other entries of a root as run-length lists, the shape of the recordings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from spte.arrays.tables import PAE_ROOT, Tables
from spte.bits import LARGE, MMU_PRESENT, PFN_MASK, ROLE_GUEST_MODE, ROLE_INVALID, ROLE_IS_DIRECT, Layout
from spte.mmu.slot.sweep import GFN_SHIFT, is_indirect

_PRESENT, _LARGE, _FRAME, _NO_FRAME = int(MMU_PRESENT), int(LARGE), int(PFN_MASK), ~PFN_MASK
_TOP_BIT = 1 << 63  # of an entry that is not present: suppress-#VE of EPT, or the non-present value of NPT


class Run(NamedTuple):
    """Neighbouring entries of one row that are alike: a ``table`` (count 1), ``leaf`` runs, an ``other`` entry (count 1)."""

    what: str
    level: int
    gfn: int  # of leaves and others the address in the tables, of a table its own
    entries: int
    value: int  # of a table its row, of leaves the bits apart from the frame, else the whole entry
    mapped: int = 0  # of leaves the gfn of the first page, which is not the address where a guest's tables say so


class KeptRoot(NamedTuple):
    """A root that a vCPU keeps in `root_mmu` or `guest_mmu`."""

    vcpu: int
    mmu: str
    which: str  # "cur", "prev0" to "prev2"
    active: bool  # the vCPU runs on it
    row: int
    role: int  # when it was loaded
    pgd: int  # CR3 or EPTP of the guest table that it shadows, else 0


def _visible(level: int, gfn: int, count: int, hide: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, count)`` of the parts of a run of entries that do not begin in the hidden gfns."""
    if hide is None:
        yield gfn, count
        return
    shift = 9 * (level - 1)
    below, above = (min(max(-((gfn - edge) >> shift), 0), count) for edge in hide)
    if below:
        yield gfn, below
    if above < count:
        yield gfn + (above << shift), count - above


def _edges(t: Tables, row: int, flags: np.ndarray[Any, np.dtype[np.uint64]], shift: int) -> list[int]:
    """Return where runs of entries begin that have the same bits and map gfns one after the other."""
    changes = flags[1:] != flags[:-1]
    if is_indirect(t, row):
        gfns = t.shadowed[row] >> GFN_SHIFT
        changes |= gfns[1:] != gfns[:-1] + np.uint64(1 << shift)
    return [0, *(np.flatnonzero(changes) + 1).tolist(), len(flags)]


def walk(t: Tables, root: int, hide: tuple[int, int] | None = None) -> list[Run]:
    """Return what hangs below `root`, depth-first and ascending, a table before what it holds; `hide` leaves addresses ``[a, b)`` out."""
    found: list[Run] = []
    if root >= 0:  # a vCPU may have none yet
        _collect(t, root, hide, 0, found)
    return found


def _collect(t: Tables, row: int, hide: tuple[int, int] | None, address: int, found: list[Run]) -> None:
    """Add to `found` what hangs below `row`, which translates `address` on."""
    level = int(t.pages[row].level)
    if t.pages[row].shadow != PAE_ROOT and (hide is None or not hide[0] <= address < hide[1]):
        found.append(Run("table", level, int(t.pages[row].gfn), 1, row))
    shift = 9 * (level - 1)
    entries = t.sptes[row]
    flags = entries & _NO_FRAME
    for first, end in pairwise(_edges(t, row, flags, shift)):
        bits = int(flags[first])
        if not bits & ~_TOP_BIT:
            continue
        if bits & _PRESENT and (level == 1 or bits & _LARGE):
            mapped = int(t.shadowed[row, first] >> GFN_SHIFT) if is_indirect(t, row) else int(t.pages[row].gfn) + (first << shift)
            for gfn, count in _visible(level, address + (first << shift), end - first, hide):
                found.append(Run("leaf", level, gfn, count, bits, mapped + gfn - address - (first << shift)))
        elif bits & _PRESENT:
            for i, entry in enumerate(entries[first:end].tolist(), first):
                _collect(t, (entry & _FRAME) >> 12, hide, address + (i << shift), found)
        else:
            for i in range(first, end):
                for gfn, _ in _visible(level, address + (i << shift), 1, hide):
                    found.append(Run("other", level, gfn, 1, int(entries[i])))


def leafs(walked: list[Run], *, mapped: bool = False) -> list[list[Any]]:
    """Return ``[level, first_gfn, count, flags]`` runs of the leaves of a walk that follow each other with equal bits but for the frame.

    `mapped` adds the gfn that the first one maps, where the tables translate other addresses than gfns.
    """
    runs: list[list[Any]] = []
    for run in walked:
        if run.what != "leaf":
            continue
        level, flags = run.level, f"{run.value:x}"
        last = runs[-1] if runs else None
        if last and last[0] == level and last[3] == flags:
            size = last[2] << (9 * (level - 1))
            if last[1] + size == run.gfn and (not mapped or last[4] + size == run.mapped):
                last[2] += run.entries
                continue
        runs.append([level, run.gfn, run.entries, flags, *([run.mapped] if mapped else [])])
    return runs


def tables(t: Tables, walked: list[Run]) -> list[list[Any]]:
    """Return ``[level, gfn, count, role, tdp, nx_disallowed, unsync]`` runs of the page-table pages of a walk, parents before children."""
    runs: list[list[Any]] = []
    for run in walked:
        if run.what != "table":
            continue
        level, gfn, row = run.level, run.gfn, run.value
        key = [
            f"{int(t.pages[row].role):x}",
            1 - int(t.pages[row].shadow),
            int(t.pages[row].nx_huge_page_disallowed != 0),
            int(t.pages[row].unsync),
        ]
        last = runs[-1] if runs else None
        if last and last[0] == level and last[3:] == key and last[1] + (last[2] << (9 * level)) == gfn:
            last[2] += 1
        else:
            runs.append([level, gfn, 1, *key])
    return runs


def other(walked: list[Run], lay: Layout) -> list[list[Any]]:
    """Return ``[level, gfn, full hex]`` of the entries of a walk that are neither present nor empty: MMIO and frozen ones."""
    empty = int(lay.nonpresent)
    return [[r.level, r.gfn, f"{r.value:x}"] for r in walked if r.what == "other" and r.value != empty]


def roots(t: Tables, lay: Layout, kept: Iterable[KeptRoot], hide: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Return where each root is kept, its role and what it maps, in the shape of the nested recordings; leaves as `leafs` has them.

    Leaves of a `guest_mmu` have the gfn that they map as a fifth value. A root that is kept twice is listed once.
    """
    found = []
    seen: dict[int, str] = {}
    for root in kept:
        role = int(t.pages[root.row].role)
        entry: dict[str, Any] = {"vcpu": root.vcpu, "mmu": root.mmu, "which": root.which, "active": int(root.active)}
        if root.which == "cur":
            entry |= {"root_level": int(t.pages[root.row].level), "role": f"{root.role:x}"}
        entry["pgd"] = f"{root.pgd:x}"
        if root.row in seen:
            found.append({**entry, "root": f"same as {seen[root.row]}"})
            continue
        seen[root.row] = f"{root.vcpu} {root.mmu} {root.which}"
        walked = walk(t, root.row, hide)
        entry |= {
            "root_role": f"{role:x}", "direct": int(role & ROLE_IS_DIRECT != 0), "guest_mode": int(role & ROLE_GUEST_MODE != 0),
            "root_invalid": int(role & ROLE_INVALID != 0),
            "leafs": leafs(walked, mapped=root.mmu == "guest_mmu"), "tables": tables(t, walked),
        }  # fmt: skip
        entries = other(walked, lay)
        found.append({**entry, "other": entries} if entries else entry)
    return found


def runs_of(values: list[int]) -> list[list[int]]:
    """Return ``[value, count]`` runs of equal values."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def bit_runs(words: np.ndarray[Any, np.dtype[np.uint64]]) -> list[list[int]]:
    """Return ``[first, count]`` runs of set bits, bit 0 of word 0 first."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0)))
    return [[int(a), int(b - a)] for a, b in edges.reshape(-1, 2)]
