"""Scenarios of patches 1, 2, 3 and 5: which SPTEs enabling write-protects, and which of them disabling drops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from spte import mm
from spte.host.backing import Backing
from spte.host.pages import the_host
from spte.mmu.memslot import max_mapping_level
from spte.patches.states import STATES, around
from spte.patches.trial import Play, Scenario, Slot, Trial
from spte.platform import PAGE_SIZE, named, without_tdp_mmu
from spte.vm.memslots import Memslot

MIB = 256  # pages
HUGE = 2 * MIB
NO_1G = dataclasses.replace(named("ept-nopml"), name="ept-nopml without 1 GiB pages", max_level=2)
INITIALLY_SET = 3  # manual protect with initially-set
_LEVELS = (3, 2, 1)
_PAGES_OF = {1: 1, 2: HUGE, 3: HUGE * HUGE}


def _logged_small(t: Trial, slot: Slot) -> None:
    """Map every page of a slot that logs: 4 KiB leaves, whatever the host has."""
    slot.log(True)
    t.write(slot.gfns)


def _stop_logging(t: Trial, slot: Slot) -> None:
    """Step: logging ends. After it, the guest writes the first page of each 2 MiB."""
    with t.step():
        slot.log(False)
    with t.after():
        t.write(slot.gfns[::HUGE])
    t.seen["pages_2m_after"] = t.vm.stats()["pages_2m"]


def _disable_small(kind: str, npages: int, *, gfn: int = 0, offset: int = 0, backing: int = 0) -> Play:
    def play(t: Trial) -> None:
        slot = t.slot(kind, npages, gfn=gfn, offset=offset, backing_pages=backing)
        _logged_small(t, slot)
        _stop_logging(t, slot)

    return play


def _host_split(t: Trial) -> None:
    """P1-c: the host has the transparent huge pages mapped by 4 KiB entries, after an mprotect of a part."""
    slot = t.slot("thp", 4 * MIB)
    for block in range(2):
        for prot in (mm.PROT_READ, mm.PROT_READ_WRITE):
            mm.mprotect(slot.backing, block * HUGE + 1, 1, prot)
    _logged_small(t, slot)
    _stop_logging(t, slot)


def _still_huge(kind: str, npages: int) -> Play:
    """P5-d and P5-e: logging is called off before the guest has written anything but the first page, in one huge leaf."""

    def play(t: Trial) -> None:
        slot = t.slot(kind, npages)
        t.write([0])
        slot.log(True)
        with t.step():
            slot.log(False)
        t.seen["pages_2m_kept"] = t.vm.stats()["pages_2m"]
        with t.after():
            t.write([0])

    return play


def _disallow(t: Trial, gfn: int) -> None:
    """Count one shadowed guest page table at `gfn`: no huge page may cover it."""
    memslot = t.vm.memslots.at(gfn)
    assert memslot is not None
    disallow = t.vm.memslots.spaces[0].disallow_lpage
    for level, first in zip((2, 3), memslot.lpage, strict=True):
        shift = 9 * (level - 1)
        disallow[first + (gfn >> shift) - (memslot.base_gfn >> shift)] += 1


def _shadowed_table(t: Trial) -> None:
    """P5-f: one page of the 2 MiB is a guest page table that KVM shadows."""
    slot = t.slot("thp", HUGE)
    _disallow(t, 7)
    _logged_small(t, slot)
    _stop_logging(t, slot)


def logging_begins(kind: str, npages: int) -> Play:
    """Play: a guest with every page mapped; logging begins, the guest writes all, again after a harvest."""

    def play(t: Trial) -> None:
        slot = t.slot(kind, npages)
        t.write(slot.gfns)
        with t.step():
            slot.log(True)
        with t.after():
            t.write(slot.gfns)
        slot.harvest()
        before = t.faults()
        t.write(slot.gfns)
        t.seen["faults_after_harvest"] = t.faults() - before

    return play


def _brute_force(memslot: Memslot, gfn: int, max_level: int, host: int, held: set[int]) -> int:
    """Return the largest level of which nothing in sight forbids the huge page around `gfn`; `held` are shadowed gfns."""
    for level in _LEVELS:
        pages = _PAGES_OF[level]
        start = gfn - gfn % pages
        inside = memslot.base_gfn <= start and start + pages <= memslot.end_gfn
        congruent = (memslot.base_gfn - memslot.hva // PAGE_SIZE) % pages == 0
        if level == 1 or (level <= min(max_level, host) and inside and congruent and not any(start <= h < start + pages for h in held)):
            return level
    raise AssertionError(gfn)


_HOST_LEVEL = {"4k": 1, "thp": 2, "hugetlb2m": 2, "hugetlb1g": 3}


def _shapes(t: Trial) -> Iterator[tuple[Slot, int]]:
    """Yield slots of every alignment, each with the host's level, every one where the one before it was."""
    for kind, host in _HOST_LEVEL.items():
        size = 3 * _PAGES_OF[3] if host == 3 else 8 * HUGE
        backing = Backing(kind, size * PAGE_SIZE, populate=True)
        for gfn, offset, npages in ((0, 0, size), (MIB, MIB, size - MIB), (HUGE, 0, size), (0, 1, size - 1), (3, 3, size - 7)):
            slot = Slot(t.vm, 0, backing, gfn, npages, offset, 0)
            yield slot, host
            slot.delete()


def _max_mapping_level(t: Trial) -> None:
    """P3: the helper against what brute force over the levels finds."""
    rng = np.random.default_rng(0)
    compared = different = above = 0
    for slot, host in _shapes(t):
        memslot = t.vm.memslots.at(slot.gfn)
        assert memslot is not None
        held = {int(g) for g in rng.integers(slot.gfn, slot.gfn + slot.npages, 2)}
        for gfn in held:
            _disallow(t, gfn)
        s, k = t.vm.memslots.row_of(memslot)
        for gfn in {slot.gfn, slot.gfn + slot.npages - 1, *held, *rng.integers(slot.gfn, slot.gfn + slot.npages, 20).tolist()}:
            for max_level in _LEVELS:
                got = int(max_mapping_level(s, the_host(), k, np.int64(gfn), np.int64(max_level)))
                different += got != _brute_force(memslot, gfn, max_level, host, held)
                above += got > min(max_level, host)
                compared += 1
    t.seen |= {"levels_compared": compared, "different": different, "above_a_limit": above}



def _collapse(name: str, claim: str, play: Play, patch: int, *zapped: int, **more: tuple[int, ...]) -> Scenario:
    """Return a scenario in which logging ends: so many leaves are zapped, with one flush if any."""
    later = {1: {"collapse_precise": True}, 5: {"mapping_level_clamped": True}}[patch] if len(zapped) == 3 else {}
    flushes = tuple(min(count, 1) for count in zapped)
    return Scenario(name, claim, around(patch, **later), play, {"zapped": zapped, "flushes": flushes, **more})


def _on_rmaps(scenario: Scenario, **expected: tuple[int, ...]) -> Scenario:
    """Return `scenario` on the rmap MMU, where other numbers are specified."""
    platform = named(scenario.platform) if isinstance(scenario.platform, str) else scenario.platform
    rmap = without_tdp_mmu(platform)
    return dataclasses.replace(scenario, name=f"{scenario.name} rmap", claim="the same", platform=rmap, expected=expected)


def _both(scenario: Scenario, *zapped: int, **more: tuple[int, ...]) -> list[Scenario]:
    """Return `scenario`, in which logging ends, on the TDP MMU and on the rmap MMU, where so many leaves are zapped."""
    flushes = tuple(min(count, 1) for count in zapped)
    return [scenario, _on_rmaps(scenario, zapped=zapped, flushes=flushes, **more)]


_DAX, _HUGETLB = (_disable_small(kind, 4 * MIB) for kind in ("devdax2m", "hugetlb2m"))
_REBUILT = {"faults_after": (0, 2), "pages_2m_after": (0, 2)}
_KEPT = {"faults_after": (1, 1), "pages_2m_kept": (0, 1)}
_ONLY_2M = _disable_small("thp", 4 * MIB, gfn=MIB, offset=MIB, backing=6 * MIB)
_SET = Scenario(
    "P2-a", "initially-set, 1024 writable 4K leaves, logging begins", around(2), logging_begins("4k", 4 * MIB),
    {"sptes_written": (1024, 0), "flushes": (1, 0), "faults_after": (1024, 0), "faults_after_harvest": (1024, 1024)}, manual=INITIALLY_SET,
)  # fmt: skip
_MIXED = Scenario(
    "P2-c", "initially-set, 2 huge and 256 4K leaves", around(2), logging_begins("thp", 5 * MIB), {"sptes_written": (258, 2)},
    manual=INITIALLY_SET,
)  # fmt: skip
SCENARIOS = {
    1: [
        *_both(_collapse("P1-a", "4 MiB of DAX, 1024 4K leaves, logging ends", _DAX, 1, 0, 1024, **_REBUILT), 1024, 1024),
        *_both(_collapse("P1-b", "4 MiB of HugeTLB, 1024 4K leaves, logging ends", _HUGETLB, 1, 0, 1024, **_REBUILT), 1024, 1024),
        *_both(_collapse("P1-c", "THP that the host maps by 4K: zapped in vain, until patch 5", _host_split, 1, 0, 1024, 0), 1024, 1024, 0),
    ],
    2: [
        _SET,
        _on_rmaps(_SET, sptes_written=(0, 0), flushes=(0, 0), faults_after=(0, 0)),
        Scenario(
            "P2-b", "1024 writable 4K leaves, not initially-set", around(2), logging_begins("4k", 4 * MIB),
            {"sptes_written": (1024, 1024), "flushes": (1, 1), "faults_after": (1024, 1024)},
        ),
        _MIXED,
        _on_rmaps(_MIXED, sptes_written=(2, 2)),
    ],
    3: [
        Scenario(
            "P3", "every alignment, host page and limit, against brute force", STATES[3:4], _max_mapping_level,
            {"levels_compared": (None,), "different": (0,), "above_a_limit": (0,)},
        ),
    ],
    5: [
        *_both(_collapse("P5-a", "THP, slot aligned, 512 4K leaves, logging ends", _disable_small("thp", HUGE), 5, 512, 512), 512, 512),
        *_both(_collapse("P5-b", "hva one page off", _disable_small("thp", HUGE, offset=1, backing=2 * HUGE), 5, 512, 0), 512, 0),
        *_both(_collapse("P5-c", "slot [1M, 5M): only [2M, 4M) can be huge", _ONLY_2M, 5, 1024, 512), 1024, 512),
        *_both(_collapse("P5-d", "nothing written, the 2M leaf is still huge", _still_huge("thp", HUGE), 5, 1, 0, **_KEPT), 0, 0),
        *_both(
            dataclasses.replace(
                _collapse("P5-e", "host maps 1G, CPU 2M at most; then clamped (6.0)", _still_huge("hugetlb1g", HUGE * HUGE), 5, 1, 1, 0),
                platform=NO_1G,
            ),
            0, 0, 0,
        ),
        *_both(_collapse("P5-f", "a guest page table in the 2M is shadowed", _shadowed_table, 5, 512, 0), 512, 0),
    ],
}  # fmt: skip
"""By patch. On the rmap MMU the walk covers level-1 leaves only, and any compound or device page counted before patch 5."""
