"""The flush rules suffice, and each flush is needed: a TLB may hold W and D until a flush, and no write gets lost.

The fast model has no TLB. These tests drive the oracle alone; the state machine holds the fast model to the oracle's
flushes.
"""

import random

import pytest
from oracle import Oracle
from oracle_host import Host
from oracle_memory import KINDS, LOG, WRITE

BASE = 512
POINTS = (512, 513, 580, 1023, 1024, 1030)  # two words of one 2 MiB region, its end, and the next region
MODES = ("get", "manual 1", "manual 3", "ring")
FLUSH_OF = {"get": "harvest", "manual 1": "harvest", "manual 3": "harvest", "ring": "reset"}


def new_oracle(platform="ept-pml", policy="6.12", mode="get", mutants=()):
    manual = int(mode[-1]) if mode.startswith("manual") else 0
    o = Oracle(platform, policy, vcpus=2, manual=manual, ring=1024 if mode == "ring" else 0, mutants=mutants)
    assert o.set_region(0, BASE, 1024, Host("thp", 1024, populate=True)) == 0
    return o


def set_log(o, flags):
    slot = o.slots[0]
    assert o.set_region(0, slot.base, slot.npages, slot.host, slot.off, flags) == 0


def write(o, v, gfn):
    assert o.run(v, [gfn], [WRITE]) is None


def harvest(o, mode, wanted=None):
    if mode == "ring":
        for v in range(len(o.vcpus)):
            o.collect(v, 1 << 16)
        o.reset_rings()
    elif o.slots[0].dirty is not None:
        seen = o.get(0)
        if o.manual:
            assert o.clear(0, 0, 1024, seen if wanted is None else seen & wanted) == 0


def losses(platform, policy, mode, seed, mutants=()):
    """Run one random program of stale and fresh writes; returns the pages lost at any time."""
    rng = random.Random(seed)
    o = new_oracle(platform, policy, mode, mutants)
    o.eager = rng.random() < 0.5

    def meanwhile():
        for _ in range(rng.randrange(3)):
            o.concurrent_write(rng.randrange(2), rng.choice(POINTS))
            if rng.random() < 0.5:
                o.drain(rng.choice(o.vcpus))

    lost = set()
    for _ in range(40):
        step = rng.choice(("write", "write", "stale", "stale", "stale", "harvest", "harvest", "toggle"))
        v, gfn = rng.randrange(2), rng.choice(POINTS)
        if step == "write":
            write(o, v, gfn)
        elif step == "stale":
            o.through_tlb(v, gfn)
        elif step == "toggle":
            set_log(o, o.slots[0].flags ^ LOG)
        else:
            o.meanwhile = meanwhile
            harvest(o, mode, {g - BASE for g in rng.sample(POINTS, 3)})
            o.meanwhile = lambda: None
        lost |= o.lost()
    return lost


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["6.12", "6.1"])
@pytest.mark.parametrize("platform", KINDS)
def test_no_write_through_a_stale_tlb_is_lost(platform, policy, mode):
    assert not any(losses(platform, policy, mode, seed) for seed in range(5))


def mutant_cases():
    for mode in MODES:
        flushes = (FLUSH_OF[mode],) if mode == "manual 3" else ("enable", FLUSH_OF[mode])
        for mutant in (*flushes, *(("bit last", "read early") if mode != "ring" else ())):
            yield mode, mutant


@pytest.mark.parametrize("platform", KINDS)
@pytest.mark.parametrize(("mode", "mutant"), list(mutant_cases()))
def test_random_programs_see_each_missing_flush_and_each_wrong_order(platform, mode, mutant):
    assert any(losses(platform, "6.12", mode, seed, (mutant,)) for seed in range(60))


@pytest.mark.parametrize("mutants", [(), ("harvest",)])
@pytest.mark.parametrize("platform", KINDS)
def test_a_write_after_the_harvest_through_the_old_translation_needs_its_flush(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    set_log(o, LOG)
    write(o, 0, BASE)
    assert o.get(0) == {0}
    assert o.through_tlb(0, BASE) == bool(mutants)
    assert o.lost() == ({(0, 0)} if mutants else set())


@pytest.mark.parametrize("mutants", [(), ("enable",)])
@pytest.mark.parametrize("platform", KINDS)
def test_a_write_after_enabling_through_the_old_translation_needs_its_flush(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    write(o, 0, BASE)
    set_log(o, LOG)
    assert o.through_tlb(0, BASE) == bool(mutants)
    assert o.lost() == ({(0, 0)} if mutants else set())


@pytest.mark.parametrize("mutants", [(), ("read early",)])
@pytest.mark.parametrize("platform", KINDS)
def test_a_write_between_protect_and_flush_is_in_the_page_that_userspace_reads(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    set_log(o, LOG)
    write(o, 0, BASE)
    stale = []
    o.meanwhile = lambda: stale.append(o.through_tlb(0, BASE))
    assert o.get(0) == {0}
    assert stale == [True, True, True]
    assert o.lost() == ({(0, 0)} if mutants else set())


@pytest.mark.parametrize("mutants", [(), ("bit last",)])
@pytest.mark.parametrize("platform", KINDS)
def test_a_fault_between_protect_and_flush_keeps_its_bit_for_the_next_harvest(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    set_log(o, LOG)
    write(o, 0, BASE)
    at_points = iter((False, True, False))  # after the exchange, after the protection, before the flush

    def meanwhile():
        if next(at_points):
            o.concurrent_write(1, BASE)
            o.drain(o.vcpus[1])

    o.meanwhile = meanwhile
    assert o.get(0) == {0}
    write(o, 1, BASE)
    assert o.lost() == ({(0, 0)} if mutants else set())


def test_splitting_and_mending_need_no_flush():
    o = new_oracle("npt")
    write(o, 0, BASE)
    before = o.flushes
    o.split_range(BASE, BASE + 512)
    assert o.through_tlb(0, BASE)
    assert o.flushes == before
