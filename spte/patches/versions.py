"""The series as a whole: what enabling and disabling write in each version, and a recorded trace through all of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.patches.mapping import HUGE, INITIALLY_SET, MIB, logging_begins
from spte.patches.trial import Play, Scenario, Trial, Value
from spte.platform import Platform, named
from spte.policy import Policy
from spte.trace import Trace

PML_RMAP, NOPML_RMAP = named("ept-pml-rmap"), named("ept-nopml-rmap")
VERSIONS = tuple(Policy.named(name) for name in ("5.11", "series", "6.12", "6.13"))
_MIXED = 5 * MIB  # of THP: 2 huge pages and 256 small ones, as the last 1 MiB can not be huge


def _logging_ends(t: Trial) -> None:
    """Step: logging ends after the guest has written one of two huge pages; before 5.18 the other one is huge still."""
    slot = t.slot("thp", _MIXED)
    t.write(slot.gfns)
    slot.log(True)
    t.write(slot.gfns[:HUGE])
    with t.step():
        slot.log(False)
    with t.after():
        t.write(slot.gfns[::HUGE])


def _other_changes(t: Trial) -> None:
    """Step: a slot that logs is created, moved, deleted; a READONLY one is created with logging, which then ends."""
    with t.step():
        slot = t.slot("4k", MIB, flags=LOG_DIRTY_PAGES)
        slot.set(LOG_DIRTY_PAGES, gfn=MIB)
        slot.delete()
        t.slot("4k", MIB, flags=LOG_DIRTY_PAGES | READONLY).set(READONLY)


def _row(
    name: str, claim: str, platform: str | Platform, play: Play, manual: int = 0, *, written: tuple[int, ...],
    zapped: tuple[int, ...] = (0,) * 4, flushes: tuple[int, ...], requests: tuple[int, ...] = (0,) * 4,
) -> Scenario:  # fmt: skip
    expected: Mapping[str, tuple[Value | None, ...]] = {
        "sptes_written": written, "zapped": zapped, "flushes": flushes, "pml_requests": requests,
    }  # fmt: skip
    return Scenario(name, claim, VERSIONS, play, expected, platform=platform, manual=manual)


_BEGINS = logging_begins("thp", _MIXED)
_SPLIT = 2 * 513  # an eager split writes 512 leaves and the link to them
_ONE = (0, 1, 1, 1)
MATRIX = [
    _row(
        "enable, PML", "D of 258 leaves, W of 2 huge; 6.12 splits those first", "ept-pml", _BEGINS,
        written=(260, 260, _SPLIT + 1280, _SPLIT + 1280), flushes=(2, 2, 1, 1), requests=_ONE,
    ),
    _row(
        "enable, PML, rmap", "D of the 256 small leaves, W of 2 huge; nothing is split", PML_RMAP, _BEGINS,
        written=(258, 258, 258, 258), flushes=(2, 2, 1, 1), requests=_ONE,
    ),
    _row(
        "enable, PML, initially-set", "W of 2 huge; since 5.14 nothing", "ept-pml", _BEGINS, INITIALLY_SET,
        written=(2, 2, 0, 0), flushes=(1, 1, 0, 0), requests=_ONE,
    ),
    _row(
        "enable, no PML", "W of 258 leaves; 6.12 splits the huge first", "ept-nopml", _BEGINS,
        written=(258, 258, _SPLIT + 1280, _SPLIT + 1280), flushes=(1, 1, 1, 1),
    ),
    _row(
        "enable, no PML, initially-set", "W of all where 2 huge would do; since 5.14 nothing", "ept-nopml", _BEGINS,
        INITIALLY_SET, written=(258, 2, 0, 0), flushes=(1, 1, 0, 0),
    ),
    _row(
        "enable, no PML, initially-set, rmap", "W of 2 huge in 5.11 too", NOPML_RMAP, _BEGINS, INITIALLY_SET,
        written=(2, 2, 0, 0), flushes=(1, 1, 0, 0),
    ),
    _row(
        "disable, PML", "512 small leaves zapped, 5.11 also a huge one and D of 256 leaves and 4 links; 2 tables; 2 recovered",
        "ept-pml", _logging_ends, written=(513 + 256 + 4, 512, 2, 2), zapped=(513, 512, 1024, 0), flushes=(2, 1, 2, 1), requests=_ONE,
    ),
    _row(
        "disable, PML, rmap", "512 small leaves zapped; 5.11 sets D of the other 256", PML_RMAP, _logging_ends,
        written=(512 + 256, 512, 512, 512), zapped=(512,) * 4, flushes=(2, 1, 1, 1), requests=_ONE,
    ),
    _row(
        "disable, no PML", "as with PML, without the D bits", "ept-nopml", _logging_ends,
        written=(513, 512, 2, 2), zapped=(513, 512, 1024, 0), flushes=(1, 1, 2, 1),
    ),
    _row(
        "READONLY, create, move, delete", "no SPTE, no flush; PML is counted", "ept-pml", _other_changes,
        written=(0,) * 4, flushes=(0,) * 4, requests=(0, 4, 4, 4),
    ),
]  # fmt: skip
"""What enabling and disabling write: 5 MiB of THP in one slot, 2 huge and 256 small leaves, all written."""


def _perform(trace: Trace, *phases: str) -> Play:
    """Play: the guest writes what the trace wrote, a harvest an epoch, and each page once when logging has ended; counts `phases`."""

    def play(t: Trial) -> None:
        def phase(name: str) -> AbstractContextManager[None]:
            return t.whole() if name in phases else nullcontext()

        slot = t.slot("thp", trace.npages)
        t.write(slot.gfns)
        with phase("enable"):
            slot.log(True)
        lost = 0
        with phase("epochs"):
            for epoch in range(trace.nepochs):
                gfns = trace.epoch(epoch)
                t.write(gfns)
                reported = np.unpackbits(t.vm.get_dirty_log(slot.number).view(np.uint8), bitorder="little")
                lost += len(gfns) - int(reported[gfns].sum())
        with phase("disable"):
            slot.log(False)
            t.write(slot.gfns)
        t.seen["pages_lost"] = lost

    return play


def on_trace(trace: Trace) -> list[Scenario]:
    """Return the series as a whole on `trace`, with PML and without: everything, and how much of it enabling and disabling are."""
    found = []
    for platform, once in (("ept-pml", _ONE), ("npt", (0,) * 4)):
        twice = tuple(2 * requests for requests in once)
        for claim, requests, phases in (
            ("everything", twice, ("enable", "epochs", "disable")),
            ("of that, enabling", once, ("enable",)),
            ("of that, disabling and one more write of each page", once, ("disable",)),
        ):
            expected: dict[str, tuple[Value | None, ...]] = {"pml_requests": requests}
            if len(phases) > 1:
                expected["pages_lost"] = (0,) * 4
            found.append(Scenario(platform, claim, VERSIONS, _perform(trace, *phases), expected, platform=platform))
    return found
