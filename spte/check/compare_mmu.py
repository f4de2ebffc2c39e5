"""The `mmu` of two records: the roots in force after each, and the first place at which their tables differ.

A vCPU has one root, or, if it runs a guest of its own, one a place where KVM keeps roots: the current and the previous
ones of `root_mmu` and of `guest_mmu`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from spte.check.difference import Difference, Json, first_in_runs

SHARED_KEYS = ("root_level", "role", "root")  # of a root that is listed elsewhere
MMU_KEYS = ("root_level", "role", "root", "root_invalid", "leafs", "tables", "other", "pfn_mismatch")
NESTED_SHARED_KEYS = ("active", "pgd", *SHARED_KEYS)
NESTED_MMU_KEYS = ("active", "pgd", "root_role", "direct", "guest_mode", *MMU_KEYS)


class Root(NamedTuple):
    """Where a root hangs. `mmu` and `which` are empty where a vCPU has one root."""

    vcpu: int
    mmu: str = ""
    which: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.vcpu), self.mmu, self.which)))


def _root_of(entry: Mapping[str, Json]) -> Root:
    return Root(entry["vcpu"], entry.get("mmu", ""), entry.get("which", ""))


def unknown_mmu_keys(entry: Mapping[str, Json]) -> list[str]:
    """Return the keys of an entry of `mmu` that no table of the format knows."""
    known = (*NESTED_MMU_KEYS, "mmu", "which") if "mmu" in entry else MMU_KEYS
    return [key for key in entry if key not in known and key != "vcpu"]


class Roots:
    """Completes the entries of one recording's `mmu`, which leave tables out that did not change."""

    def __init__(self) -> None:
        self._tables: dict[tuple[Json, ...], Json] = {}

    def complete(self, entries: Iterable[Mapping[str, Json]]) -> dict[Root, dict[str, Json]]:
        """Return the entries of one record, each with all that is compared; a root without an entry does not exist."""
        return {_root_of(entry): self._entry(entry) for entry in entries}

    def _entry(self, entry: Mapping[str, Json]) -> dict[str, Json]:
        nested = "mmu" in entry
        if "root" in entry:
            return {key: entry.get(key) for key in (NESTED_SHARED_KEYS if nested else SHARED_KEYS)}
        place = (entry["vcpu"], entry.get("mmu"), entry.get("pgd"), entry.get("root_role"))
        if "tables" in entry:
            self._tables[place] = entry["tables"]
        return {
            **{key: entry.get(key) for key in (NESTED_MMU_KEYS if nested else MMU_KEYS)},
            "tables": self._tables.get(place),
            "other": entry.get("other", []),
            "pfn_mismatch": entry.get("pfn_mismatch", []),
        }


def root_differences(expected: Mapping[Root, Json], got: Mapping[Root, Json]) -> Iterator[Difference]:
    """Yield where the roots of two sides differ: what each is, then its tables."""
    for root in sorted(expected.keys() | got.keys()):
        a, b = expected.get(root), got.get(root)
        name = f"mmu[{root}]"
        if a is None or b is None:
            yield Difference(name, a, b)
            continue
        for part in NESTED_MMU_KEYS:
            left, right = a.get(part), b.get(part)
            if left == right:
                continue
            if part in ("leafs", "tables", "other") and isinstance(left, list) and isinstance(right, list):
                where = first_in_runs(_runs(part, left), _runs(part, right))
                if where is not None:  # else the same SPTEs, merged in another way
                    level, gfn, x, y = where
                    if part == "leafs":
                        x, y = _absolute(x, gfn), _absolute(y, gfn)
                    yield Difference(f"{name}.{part}", x, y, gfn, level)
            else:
                yield Difference(f"{name}.{part}", left, right)


def _runs(part: str, rows: Sequence[Sequence[Json]]) -> list[Sequence[Json]]:
    """Return the rows of a listing as runs: an L1 gfn, which advances with its run, as its distance from the L2 gfn."""
    if part == "other":
        return [(row[0], row[1], 1, row[2]) for row in rows]
    if part == "leafs":
        return [(*row[:4], *(l1_gfn - row[1] for l1_gfn in row[4:])) for row in rows]
    return list(rows)


def _absolute(value: Json, gfn: int) -> Json:
    """Return what a leaf holds at L2's `gfn`, its distance turned back into L1's gfn."""
    return [value[0], gfn + value[1]] if isinstance(value, list) else value
