"""Every kernel beside its limit: which loop it is measured against, and the ratio that it should keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spte.arrays.records import I64s, U64s
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.bits import ALL_ONES, SHIFT_PAGE, WRITABLE
from spte.host.pages import the_host
from spte.kernels._pml_flush import pml_flush
from spte.limits.bare_loops import any_set, protect_by_walk, read_first, rearm_by_zeros, scatter_bits, scatter_or, scatter_store, sweep
from spte.limits.measure import BATCH, Case, Guest, Ratio, measure
from spte.mmu.dirty_log.harvest import get_dirty_log
from spte.mmu.slot.clear_dirty import clear_dirty_slot
from spte.mmu.slot.collapse import AHEAD, collapse_slot
from spte.mmu.slot.split import split_slot
from spte.mmu.slot.write_protect import write_protect_slot
from spte.platform import Platform

FRACTIONS = (1.0, 0.5, 0.1, 0.01, 0.001, 0.0)
PATTERNS = ("random", "runs")
ORDERS = ("ascending", "random")
BUFFERS = 2048  # PML buffers of one flush
KVM_RECOVER_NS = 37_000.0  # per 2 MiB, commit message of 13e2e4f62a4b
_PML_WHY = "two random lines a write, the SPTE and the word of the bitmap, are read and written back, where the limit has one"
_DRAIN_WHY = "it also looks whether a page is in the slot and counts the bits that were clear"
_RECOVER_WHY = "a leaf takes its bits from the first one of its table, which lies on a page of its own: the next row has that as its limit"
_SPLIT_WHY = "the last table freed is the next one taken: tables are filled one by one and backwards, where the limit runs through memory"
_HARVEST_WHY = "loop and kernel wait for the same lines of memory, five of a table: prefetched 8, 16 or 32 entries ahead, they take as long"
IN_CACHE = (32 << 30) >> 12  # pages of a guest whose tables lie, at least in part, in the host's caches
_HARVEST_IN_CACHE_WHY = "in a cache the loop's own speculation hides what prefetching hides in memory, and the list of pages is a pass more"
_CALL_WHY = "half of the call is to take apart the arrays of tables and slots"
_WRITES_IN_CACHE_WHY = "a walk reads the list of tables and the entry, where the limit reads one word that a cache holds"
_TOUCH_IN_CACHE_WHY = "a fault's own instructions take as long at every size, the limit's stores stay in the caches"
_SWEEP_IN_CACHE_WHY = "where entries come from a cache, to look whether each is present, and to count, takes longer than they do"
_LEAVES, _FILL = "np.bitwise_and in place", "filling the rows"
_HARVEST_BARS = {1.0: 1.5, 0.5: 1.0, 0.1: 1.0, 0.01: 0.8, 0.001: 0.8, 0.0: 1.2}
_TOUCH_BARS = {"ascending": 6.0, "random": 12.0}


def write_protect(guest: Guest) -> Case:
    """Write-protect of the slot, rows in arena order."""
    work = lambda: write_protect_slot(guest.tables, 0, 0, guest.pages, 1, 1)  # noqa: E731
    return _sweep(guest, f"write-protect, arena order, {guest.vm.platform.name}", work, 1.25)


def clear_dirty(guest: Guest) -> Case:
    """Clear-dirty of the slot, rows in arena order."""
    work = lambda: clear_dirty_slot(guest.tables, guest.vm.mmu.mode, 0, 0, guest.pages)  # noqa: E731
    return _sweep(guest, "clear-dirty, arena order", work, 1.25)


def write_protect_by_walk(guest: Guest) -> Case:
    """Write-protect of the slot, each table found from the root."""
    root = np.int64(guest.slot()[3][0])
    work = lambda: protect_by_walk(guest.tables, root, np.int64(0), np.int64(guest.pages))  # noqa: E731
    return _sweep(guest, "write-protect, walking four levels", work, 1.5)


def write_protect_by_two(guest: Guest) -> Case:
    """Two threads on halves of the slot, beside one thread on all of it."""
    pool, half = ThreadPoolExecutor(2), guest.pages // 2

    def one(start: int, end: int) -> int:
        return int(write_protect_slot(guest.tables, 0, start, end, 1, 1))

    def both() -> int:
        return sum(pool.map(one, (0, half), (half, guest.pages)))

    whole = lambda: one(0, guest.pages)  # noqa: E731
    return Case("write-protect, two threads", "SPTE", guest.pages, both, "one thread", whole, None, guest.set_all, guest.set_all)


def _sweep(guest: Guest, name: str, work: Callable[[], object], at_most: float) -> Case:
    limit = lambda: sweep(guest.flat, ~WRITABLE)  # noqa: E731
    why = _SWEEP_IN_CACHE_WHY if guest.pages <= IN_CACHE else ""
    return Case(name, "SPTE", guest.pages, work, _LEAVES, limit, at_most, guest.set_all, guest.set_flat, why=why)


def bitmap_of(pages: int, fraction: float, pattern: str) -> U64s:
    """Return a dirty bitmap with `fraction` of the pages set: single ones at random, or whole 2 MiB at random."""
    rng = np.random.default_rng(0)
    if fraction in (0.0, 1.0):
        return np.full(pages // 64, ALL_ONES if fraction else 0, np.uint64)
    if pattern == "runs":
        regions = rng.random(pages // 512) < fraction
        regions[0] |= not regions.any()
        return np.repeat(regions, 8) * ALL_ONES
    parts = [rng.random(min(BATCH, pages - at), np.float32) < fraction for at in range(0, pages, BATCH)]
    return np.concatenate([np.packbits(part, bitorder="little").view(np.uint64) for part in parts])


def harvest(guest: Guest, fraction: float, pattern: str = "random") -> Case:
    """GET_DIRTY_LOG of the slot."""
    s, k, bitmap, roots = guest.slot()
    dirty, shift = bitmap_of(guest.pages, fraction, pattern), guest.vm.mmu.mode[0].lay.dirty_shift

    def refill() -> None:
        guest.set_all()
        bitmap[:] = dirty
        guest.out[:] = 0

    def refill_limit() -> None:
        guest.set_flat()
        guest.words[:] = dirty
        guest.out[:] = 0

    work = lambda: get_dirty_log(guest.tables, s, guest.vm.mmu.mode, roots, k, guest.out)  # noqa: E731
    pages = int(np.bitwise_count(dirty).sum(dtype=np.int64))
    name = f"harvest, {100 * fraction:g} % dirty" + (", 2 MiB runs" if pattern == "runs" else "")
    bar = None if pattern == "runs" else _HARVEST_BARS[fraction]
    if fraction == 0.0:
        read = lambda: any_set(guest.words)  # noqa: E731
        return Case(name, "word", len(dirty), work, "reading the bitmap", read, bar, refill, refill_limit, why=_CALL_WHY)
    if fraction == 1.0:
        whole = lambda: sweep(guest.flat, ~WRITABLE)  # noqa: E731
        return Case(name, "page", pages, work, _LEAVES, whole, bar, refill, guest.set_flat)
    zeros = lambda: rearm_by_zeros(guest.flat, guest.words, guest.out, shift)  # noqa: E731
    why = _HARVEST_IN_CACHE_WHY if guest.pages <= IN_CACHE else _HARVEST_WHY if fraction == 0.01 else ""
    return Case(name, "page", pages, work, "a trailing-zeros loop", zeros, bar, refill, refill_limit, why=why)


def random_gfns(guest: Guest, count: int) -> I64s:
    """Return at most `count` distinct gfns in random order."""
    rng = np.random.default_rng(1)
    if count >= guest.pages:
        return rng.permutation(guest.pages)
    return rng.permutation(np.unique(rng.integers(0, guest.pages, count)))


def guest_writes(guest: Guest, logs: bool) -> Case:
    """Guest writes at random, W set: with D set, or with D clear and PML logging each."""
    gfns, bit = random_gfns(guest, 1 << 22), guest.dirty_bit()

    def refill() -> None:
        guest.set_all()
        if logs:
            clear_dirty_slot(guest.tables, guest.vm.mmu.mode, 0, 0, guest.pages)

    name = "random guest writes, PML logs each" if logs else "random guest writes, W and D set"
    work, limit = (lambda: guest.write(gfns)), (lambda: scatter_or(guest.flat, gfns, bit))
    why = _PML_WHY if logs else _WRITES_IN_CACHE_WHY if guest.pages <= IN_CACHE else ""
    return Case(name, "write", len(gfns), work, "a[gfn] |= D", limit, 2.5 if logs else 1.5, refill, guest.set_flat, why=why)


def pml_drain(guest: Guest) -> Case:
    """Flush of many full PML buffers into one bitmap, the kernel alone."""
    gfns = np.random.default_rng(2).integers(0, guest.pages, BUFFERS * 512)
    buffers = (gfns.astype(np.uint64) << SHIFT_PAGE).reshape(BUFFERS, 512)
    index = np.full(BUFFERS, 0xFFFF)
    work, limit = (lambda: pml_flush(buffers, index, guest.words)), (lambda: scatter_bits(guest.out, gfns))
    clear, clear_limit = (lambda: guest.words.fill(0)), (lambda: guest.out.fill(0))
    name = f"PML drain, {BUFFERS} buffers"
    return Case(name, "entry", len(gfns), work, "scatter of bits", limit, 1.3, clear, clear_limit, why=_DRAIN_WHY)


def first_touch(guest: Guest, order: str) -> Case:
    """Slow faults: the first write to each page. In random order the tables are there already."""
    at_random = order == "random"
    gfns = random_gfns(guest, 1 << 22) if at_random else np.arange(min(guest.pages, 1 << 24))

    def unmap() -> None:
        guest.renew()
        guest.write(np.arange(0, guest.pages if at_random else 512, 512))

    fill = lambda: guest.flat[: len(gfns)].fill(1)  # noqa: E731
    store = lambda: scatter_store(guest.flat, gfns, np.uint64(1))  # noqa: E731
    limit, name = (store, _FILL + " in that order") if at_random else (fill, _FILL)
    work = lambda: guest.write(gfns)  # noqa: E731
    why = _TOUCH_IN_CACHE_WHY if guest.pages <= IN_CACHE else ""
    bar = _TOUCH_BARS[order]
    return Case(f"slow fault, first touch {order}", "fault", len(gfns), work, name, limit, bar, unmap, guest.set_flat, why=why)


def split(guest: Guest) -> Case:
    """Eager split of 2 MiB leaves; `guest` has thp memory, its huge leaves there, and a policy that recovers in place."""
    fill = lambda: guest.flat.fill(1)  # noqa: E731
    limit_setup = guest.set_flat
    return Case(
        "eager split, 2 MiB to 4 KiB", "SPTE", guest.pages, lambda: _split(guest), _FILL, fill, 1.5, lambda: _collapse(guest), limit_setup,
        why=_SPLIT_WHY,
    )


def collapse(guest: Guest, *, beside_leaves: bool = False) -> Case:
    """Recovery of 2 MiB leaves in place, beside a pass over the parents or over the first leaf of each table; `guest` as for `split`."""
    parents, first = guest.flat[: guest.pages // 512], np.zeros(guest.pages // 512, np.uint64)
    work, refill = (lambda: _collapse(guest)), (lambda: _split(guest))
    if beside_leaves:
        leaves = lambda: read_first(guest.flat, first, np.int64(AHEAD))  # noqa: E731
        name = "reading the first leaf of each table"
        return Case("recover in place, again", "2 MiB", len(parents), work, name, leaves, None, refill, guest.set_flat)
    limit = lambda: sweep(parents, ~WRITABLE)  # noqa: E731
    return Case("recover in place", "2 MiB", len(parents), work, "a pass over the parents", limit, 3.0, refill, why=_RECOVER_WHY)


def _split(guest: Guest) -> None:
    split_slot(guest.tables, guest.vm.mmu.mode, guest.slot()[3], 0, guest.pages)


def _collapse(guest: Guest) -> None:
    s, k, _, roots = guest.slot()
    collapse_slot(guest.tables, s, the_host(), guest.vm.mmu.mode, roots, k)


def small_guest(pages: int, platform: str | Platform = "ept-pml") -> Guest:
    """Return a guest of 4 KiB leaves that logs."""
    guest = Guest(pages, platform)
    guest.populate()
    guest.set_flags(LOG_DIRTY_PAGES)
    return guest


def huge_guest(pages: int) -> Guest:
    """Return a guest of 2 MiB leaves under a policy that recovers them in place."""
    guest = Guest(pages, policy="6.13", backing="thp")
    guest.write(np.arange(0, pages, 512))
    return guest


def against_kvm(ratio: Ratio) -> Ratio:
    """Return a measured recovery beside KVM's own figure."""
    return Ratio(ratio.name, ratio.unit, ratio.ns, "KVM, 37 us", KVM_RECOVER_NS, 0.01)


def measure_all(pages: int, rounds: int = 5, progress: Callable[[str], None] | None = None) -> Iterator[Ratio]:
    """Measure every kernel on a guest of `pages` 4 KiB pages, a multiple of 512, and yield each ratio as it is known.

    Parameters
    ----------
    pages : int
        Guest memory; two arrays of 8 bytes a page are touched.
    rounds : int
        Rounds of each kernel; the least time counts.
    progress : callable, optional
        Called with the name of each case before it is measured.
    """

    def told(case: Case) -> Ratio:
        if progress is not None:
            progress(case.name)
        return measure(case, rounds)

    guest = small_guest(pages)
    for build in (write_protect, clear_dirty, write_protect_by_walk, write_protect_by_two):
        yield told(build(guest))
    for fraction in FRACTIONS:
        yield told(harvest(guest, fraction))
    for logs in (False, True):
        yield told(guest_writes(guest, logs))
    yield told(pml_drain(guest))
    for order in ORDERS:
        yield told(first_touch(guest, order))
    guest.vm.close()
    del guest
    guest = huge_guest(pages)
    yield told(split(guest))
    recovery = told(collapse(guest))
    yield recovery
    yield against_kvm(recovery)
    guest.vm.close()
