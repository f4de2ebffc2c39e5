"""A VM that many threads use: no write is lost, nobody waits for a long batch, and what threads do not see is as for one thread."""

import itertools
import threading
import time

import numpy as np
import pytest
from conftest import LOG, PAGE, Guest, pages_of

import spte
from spte import mm
from spte._numba import jit as _jit
from spte.bits import MMU_PRESENT, PFN_MASK, SHIFT_PAGE
from spte.errors import ClosedError
from spte.host import pages as hostmm
from spte.mmu.walk import walk
from spte.vm import kvm, vcpu_run

SECONDS = 120  # a deadlock fails the test
WRITERS = 4


# -- writers against everything that a VMM does ---------------------------------------------------------------------------


class Migration:
    """Slot 0 is written and harvested, slot 1 moves and is written; when each page was last written and reported, by one clock.

    A report covers a page up to the moment from which its next write is seen: the end of GET, of CLEAR, of RESET, of logging enabled.
    """

    SLOT_PAGES = 2048
    MOVED_PAGES = 64
    PLACES = 1 << 18, (1 << 18) + 4096  # gfns where slot 1 may be

    def __init__(self, platform, mode):
        self.guest = Guest(platform, mode=mode, kind="thp", npages=self.SLOT_PAGES, vcpus=WRITERS)
        self.vm, self.base, self.clock = self.guest.vm, self.guest.base, itertools.count(1)
        self.moved = spte.Backing("4k", self.MOVED_PAGES * PAGE)
        self.written, self.reported = (np.zeros(self.SLOT_PAGES + self.MOVED_PAGES, np.int64) for _ in range(2))
        self.harvests = self.writes = self.moves = self.misses = 0
        self.place(0, LOG)
        self.guest.set_flags(LOG)
        self.covers(slice(None), next(self.clock))
        self.rng = np.random.default_rng(1)

    def place(self, n, flags):
        self.vm.set_memory_region(1, self.PLACES[n] * PAGE, self.moved.size, self.moved, flags=flags)

    def covers(self, pages, now):
        np.maximum.at(self.reported, pages, now)

    def write(self, v, until):
        """A vCPU's thread; each has pages of its own, because the clock is read before and after a batch only."""
        rng = np.random.default_rng(v)
        while not until.is_set():
            pages = rng.integers(0, self.SLOT_PAGES // WRITERS, rng.integers(1, 64)) * WRITERS + v
            self.run(v, pages + self.base, pages)
            page = rng.integers(0, self.MOVED_PAGES // WRITERS) * WRITERS + v
            self.run(v, np.array([page + self.PLACES[rng.integers(2)]]), np.array([page + self.SLOT_PAGES]))

    def run(self, v, gfns, pages):
        while len(gfns):
            now = next(self.clock)
            stop = self.vm.vcpus[v].write(gfns)
            done = len(gfns) if stop is None else stop.index
            self.written[pages[:done]] = now
            self.writes += done
            if stop is not None and stop.reason == "mmio":  # slot 1 is elsewhere
                assert stop.gfn >= self.PLACES[0]
                self.misses += 1
                done += 1
            elif stop is not None:
                assert stop.reason == "dirty_ring_full"
                time.sleep(0)
            gfns, pages = gfns[done:], pages[done:]

    def harvest(self):
        if self.guest.mode == "ring":
            pages = []
            for v, vcpu in enumerate(self.vm.vcpus):
                ring = vcpu.ring
                while ring["flags"][at := self.guest.taken[v] % len(ring)] == 1:
                    pages.append(int(ring["offset"][at]) + self.SLOT_PAGES * int(ring["slot"][at]))
                    ring["flags"][at] = 3
                    self.guest.taken[v] += 1
            self.vm.reset_dirty_rings()
            self.covers(pages, next(self.clock))
        else:
            for slot, first, npages in ((0, 0, self.SLOT_PAGES), (1, self.SLOT_PAGES, self.MOVED_PAGES)):
                bitmap = self.vm.get_dirty_log(slot)
                if self.guest.mode != "get":
                    self.vm.clear_dirty_log(slot, 0, npages, bitmap)
                self.covers(np.array(sorted(pages_of(bitmap)), np.int64) + first, next(self.clock))
        self.harvests += 1

    def migrate(self, until):
        """The thread that harvests, and turns logging off and on: then all of a slot counts as reported."""
        while not until.is_set():
            self.harvest()
            if self.rng.integers(8) == 0:
                self.guest.set_flags(0)
                self.guest.set_flags(LOG)
                self.covers(slice(0, self.SLOT_PAGES), next(self.clock))

    def move(self, until):
        """The thread that moves slot 1, and looks at everything."""
        while not until.is_set():
            self.moves += 1
            self.place(self.moves % 2, LOG)
            self.vm.stats(), self.vm.leafs(), self.vm.slots()
            mm.madvise(self.guest.memory, 0, 16, mm.PAGEOUT, ages=True)
            self.vm.check()

    def lost(self):
        return np.flatnonzero(self.written > self.reported).tolist()


def lost_in(platform, mode, pool, seconds):
    m = Migration(platform, mode)
    end = time.monotonic() + seconds
    while m.harvests < 8 or m.moves < 4 or time.monotonic() < end:
        until = threading.Event()
        threads = [pool.submit(m.write, v, until) for v in range(WRITERS)]
        threads += [pool.submit(m.migrate, until), pool.submit(m.move, until)]
        until.wait(0.1)
        until.set()
        for thread in threads:
            thread.result(SECONDS)
        m.harvest()
        m.vm.check()
        assert m.lost() == []
    assert min(m.writes, m.harvests, m.moves, m.misses) > 0
    m.guest.set_flags(0)
    m.place(m.moves % 2, 0)
    m.vm.close()


MODES = ("get", "manual 1", "manual 3", "ring")
FAST = [("ept-pml", "get"), ("npt", "manual 1"), ("ept-pml-rmap", "manual 3"), ("ept-pml", "ring"), ("shadow", "get")]


@pytest.mark.parametrize(("platform", "mode"), FAST)
def test_no_write_is_lost_whatever_other_threads_do(platform, mode, pool):
    lost_in(platform, mode, pool, 0.3)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("platform", ["ept-pml", "npt", "npt-pml-rmap", "shadow"])
def test_no_write_is_lost_in_ten_seconds(platform, mode, pool):
    lost_in(platform, mode, pool, 10)


# -- long batches ---------------------------------------------------------------------------------------------------------

LONG, PIECE = (20_000, 64) if _jit.PLAIN else (1 << 23, kvm.PIECE)


def busy_guest(vcpus=1):
    """A guest, and pages for a batch that takes long."""
    guest = Guest("ept-pml", npages=4096, vcpus=vcpus)
    guest.set_flags(LOG)
    for vcpu in guest.vm.vcpus:
        vcpu.arrays.vcpu["piece"] = PIECE
    return guest, np.random.default_rng(0).integers(0, guest.npages, LONG) + guest.base


def begin(pool, guest, access, gfns):
    """Begin a batch on another thread; it has the lock first, and the caller's next call comes in the middle of it."""
    with guest.vm.exclusive:
        batch = pool.submit(access, gfns)
        while not guest.vm.exclusive.contended:
            time.sleep(0)
    return batch


def test_a_harvest_does_not_wait_for_a_long_batch(pool):
    guest, gfns = busy_guest()
    batch = begin(pool, guest, guest.vm.vcpus[0].write, gfns)
    first = guest.harvest()
    assert not batch.done()
    assert guest.stats("exits") < len(gfns)
    assert batch.result(SECONDS) is None
    assert first
    assert set(first) | set(guest.harvest()) == set((gfns - guest.base).tolist())


def test_a_batch_that_began_alone_goes_on_beside_others_once_threads_have_met(pool, monkeypatch):
    guest, gfns = busy_guest()
    real, beside = vcpu_run.run_shared, []
    monkeypatch.setattr(vcpu_run, "run_shared", lambda *args: beside.append(args[-1]) or real(*args))
    batch = begin(pool, guest, guest.vm.vcpus[0].write, gfns)
    first = guest.harvest()
    assert batch.result(SECONDS) is None
    assert beside
    assert set(first) | set(guest.harvest()) == set((gfns - guest.base).tolist())


def test_a_short_batch_of_one_vcpu_does_not_wait_for_the_end_of_a_long_one_of_another(pool):
    guest, gfns = busy_guest(vcpus=2)
    long = begin(pool, guest, guest.vm.vcpus[0].write, gfns)
    assert guest.vm.vcpus[1].write(gfns[:100]) is None
    assert not long.done()
    assert long.result(SECONDS) is None


def test_a_vcpu_is_one_threads_at_a_time(pool):
    """A second one's access comes after the batch, to whose end nothing is counted any more."""
    guest, gfns = busy_guest()
    batch = begin(pool, guest, guest.vm.vcpus[0].write, gfns)
    assert guest.vm.vcpus[0].read([1 << 20]).reason == "mmio"
    counted = guest.vm.stats()
    assert batch.result(SECONDS) is None
    assert guest.vm.stats() == counted


def test_who_runs_when_the_vm_is_closed_hears_so(pool):
    guest, gfns = busy_guest()
    batch = begin(pool, guest, guest.vm.vcpus[0].write, gfns)
    guest.set_flags(0)
    guest.vm.close()
    with pytest.raises(ClosedError):
        batch.result(SECONDS)
    with pytest.raises(ClosedError):
        guest.vm.vcpus[0].write(gfns[:1])


# -- several VMs ----------------------------------------------------------------------------------------------------------

REPEATS = 2 if _jit.PLAIN else 2000  # so that accesses take their share of the time


def test_vms_that_share_memory_from_both_sides_lose_nothing(pool):
    """A first write after a read copies the host's zero page: each VM takes the page from the other, in the middle of its own fault."""
    npages, memory = 512, spte.Backing("4k", 512 * PAGE)
    vms = [spte.VM(platform, vcpus=2) for platform in ("ept-pml", "npt")]
    done = [0, 0, 0]

    def use(n, v):
        gfns = np.random.default_rng(n + 2 * v).permutation(npages)
        for part in np.split(gfns, 32):
            vms[n].vcpus[v].read(part)
            assert vms[n].vcpus[v].write(np.tile(part, REPEATS)) is None
            done[n] += len(part)

    def stale(vm):
        """Pages that the VM maps to the zero page though the host has written them."""
        t, root = vm.mmu.tables, vm.vcpus[0].arrays.vcpu[0].root
        entries = [(gfn, t.sptes[row, i]) for gfn in range(npages) for row, i, _ in [walk(t, root, np.int64(gfn))]]
        zero = [gfn for gfn, spte in entries if spte & MMU_PRESENT and spte & PFN_MASK == hostmm.ZERO_PFN << SHIFT_PAGE]
        h, blocks = hostmm.the_host(), {gfn: (memory.hpage + gfn) >> 9 for gfn in zero}
        pages = {gfn: h.page[h.blocks["row"][block], (memory.hpage + gfn) & 511] for gfn, block in blocks.items()}
        return [gfn for gfn in zero if h.blocks["state"][blocks[gfn]] != hostmm.MIXED or pages[gfn] != hostmm.PAGE_ZERO]

    def take_away():
        for first in range(0, npages, 16):
            mm.madvise(memory, first, 16)
            mm.fork([memory])
            memory.write(first, 4)
            done[2] += 1

    for vm in vms:
        vm.set_memory_region(0, 0, memory.size, memory, flags=LOG)
    assert vms[0].exclusive.turnstile is vms[1].exclusive.turnstile is memory.exclusive.turnstile
    for _ in range(1 if _jit.PLAIN else 8):
        users = [pool.submit(use, n, v) for n in range(2) for v in range(2)] + [pool.submit(take_away)]
        for user in users:
            user.result(SECONDS)
        for vm in vms:
            vm.check()
            assert stale(vm) == []
            assert pages_of(vm.get_dirty_log(0)) == set(range(npages))
    assert min(done) > 0
    for vm in vms:
        vm.set_memory_region(0, 0, 0)


def test_two_vms_on_two_threads_have_rows_of_host_pages_of_their_own(pool):
    """Every block whose pages differ has a row of the process's one array: none is given out twice."""
    blocks, rounds = (8, 2) if _jit.PLAIN else (4096, 40)
    together = threading.Barrier(2)

    def use(n):
        gfns = np.random.default_rng(n).permutation(blocks) * 512
        for _ in range(rounds):
            memory, vm = spte.Backing("4k", blocks * 512 * PAGE), spte.VM("npt")
            vm.set_memory_region(0, 0, memory.size, memory)
            together.wait(SECONDS)
            assert vm.vcpus[0].write(gfns) is None  # takes rows
            assert vm.vcpus[0].write(np.arange(4 * 512)) is None  # gives some back: these blocks are all there
        vm.check()
        return vm, memory

    alive = [thread.result(SECONDS) for thread in [pool.submit(use, n) for n in range(2)]]
    h, free = hostmm.the_host(), []
    row = int(h.rows["free"][0]) - 1
    while row >= 0 and row not in free[-1:]:
        free.append(row)
        row = int(h.mixed_blocks["next_free"][row]) - 1
    in_use = []
    for _, memory in alive:
        host = h.blocks[memory.hpage >> 9 :][:blocks]
        assert (host["state"] == hostmm.MIXED).sum() == blocks - 4
        in_use += host["row"][host["state"] == hostmm.MIXED].tolist()
    assert len({*free, *in_use}) == len(free) + len(in_use)
