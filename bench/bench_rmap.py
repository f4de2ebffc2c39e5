"""The shadow MMU's rmaps beside the direct MMU: the same work on two guests of one process."""

import numpy as np
import pytest

from bench.conftest import HUGE_PAGE
from spte.limits import cases as ratios
from spte.limits.measure import Case, Guest
from spte.mmu.dirty_log.harvest import get_dirty_log
from spte.mmu.slot.clear_dirty import clear_dirty_slot
from spte.mmu.slot.rmap import zap_rmaps
from spte.mmu.slot.write_protect import write_protect_slot
from spte.mmu.slot.zap import zap_range
from spte.platform import named

SLOT_BAR, FAULT_BAR = 3.0, 4.0
REFILLED = 1 << 24  # pages at most, where each refill faults page by page
SHADOW_REACH = 1 << 20  # pages: a guest without paging addresses 4 GiB
WHY = "heads of rmaps are read beside the entries, one a page"
PLATFORMS = {"rmap": named("ept-pml-rmap"), "shadow": named("shadow")}


@pytest.fixture(scope="module")
def both(pages):
    """Two guests of 4 KiB leaves that log: rmaps, and none."""
    pair = ratios.small_guest(pages, PLATFORMS["rmap"]), ratios.small_guest(pages)
    with pair[0].vm, pair[1].vm:
        yield pair


def beside(name, unit, units, pair, work, setup, at_most=SLOT_BAR):
    """Return the case of `work` on the first guest with the same on the second as its limit."""
    one, two = pair
    return Case(
        f"rmap: {name}", unit, units, lambda: work(one), "the direct MMU", lambda: work(two), at_most,
        setup=lambda: setup(one), limit_setup=lambda: setup(two), why=WHY,
    )  # fmt: skip


def test_write_protect_of_a_slot(compare, both):
    protect = lambda g: write_protect_slot(g.tables, 0, 0, g.pages, 1, 1)  # noqa: E731
    compare(beside("write-protect of a slot", "SPTE", both[0].pages, both, protect, Guest.set_all))


def test_clear_dirty_of_a_slot(compare, both):
    clear = lambda g: clear_dirty_slot(g.tables, g.vm.mmu.mode, 0, 0, g.pages)  # noqa: E731
    compare(beside("clear-dirty of a slot", "SPTE", both[0].pages, both, clear, Guest.set_all))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1, 0.01, 0.001])
def test_harvest(compare, both, fraction):
    dirty = ratios.bitmap_of(both[0].pages, fraction, "random")

    def refill(g):
        g.set_all()
        g.slot()[2][:] = dirty
        g.out[:] = 0

    def harvest(g):
        s, k, _, roots = g.slot()
        return get_dirty_log(g.tables, s, g.vm.mmu.mode, roots, k, g.out)

    count = int(np.bitwise_count(dirty).sum(dtype=np.int64))
    compare(beside(f"harvest, {100 * fraction:g} % dirty", "page", max(count, 1), both, harvest, refill))


def fill(guest):
    """Map every page at 4 KiB; those of a slot that logs one by one."""
    guest.write(np.arange(min(guest.pages, REFILLED)))


def test_zap_of_a_slot(compare, both):
    end = np.int64(min(both[0].pages, REFILLED))

    def zap(g):
        s, k, _, roots = g.slot()
        if g.vm.mmu.mode[0].shadow:
            return zap_rmaps(g.tables, s, g.vm.mmu.mode, k, np.int64(0), end)
        return zap_range(g.tables, g.vm.mmu.mode, roots, np.int64(0), end)

    compare(beside("zap of a slot", "SPTE", int(end), both, zap, fill))


def test_collapse_of_a_slot(compare, pages):
    """Logging is turned off: tables are dropped by one, leaves zapped by the other."""

    pages = min(pages, REFILLED)

    def small_leaves(g):
        g.set_flags(1)
        fill(g)

    pair = Guest(pages, PLATFORMS["rmap"], backing="thp"), Guest(pages, backing="thp")
    with pair[0].vm, pair[1].vm:
        compare(beside("collapse of a slot", "SPTE", pages, pair, lambda g: g.set_flags(0), small_leaves))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("order", ratios.ORDERS)
def test_slow_fault(compare, pages, platform, order):
    """In a slot that logs: there each page faults alone under both, without runs of first touches and without prefetch."""
    pages = min(pages, SHADOW_REACH if platform == "shadow" else REFILLED)  # a second pair beside `both`: memory
    pair = Guest(pages, PLATFORMS[platform]), Guest(pages)
    gfns = ratios.random_gfns(pair[0], 1 << 22) if order == "random" else np.arange(min(pages, 1 << 22))
    tables = np.arange(0, pages, HUGE_PAGE >> 12)

    def unmap(g):
        g.renew()
        g.set_flags(1)
        g.write(tables)

    with pair[0].vm, pair[1].vm:
        compare(beside(f"{platform} slow fault, {order}", "fault", len(gfns), pair, lambda g: g.write(gfns), unmap, FAULT_BAR))
