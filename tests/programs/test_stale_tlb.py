"""The races of a harvest, one by one: a TLB may hold W and D until a flush, and the order is bit, protection, flush, reading.

The fast model has no TLB. These tests drive the oracle alone; the state machine holds the fast model to the oracle's flushes.
"""

import pytest
from conftest import PLATFORMS
from oracle.host import Host
from oracle.memory import LOG, SPAN, WRITE
from oracle.rmap import oracle_of

BASE = 512


def new_oracle(platform="ept-pml", policy="6.12", mutants=()):
    o = oracle_of(platform, policy, vcpus=2, mutants=mutants)
    assert o.set_region(0, BASE, 1024, Host("thp", 1024, populate=True)) == 0
    return o


def set_log(o, flags):
    slot = o.slots[0]
    assert o.set_region(0, slot.base, slot.npages, slot.host, slot.off, flags) == 0


def write(o, v, gfn):
    assert o.run(v, [gfn], [WRITE]) is None


@pytest.mark.parametrize("mutants", [(), ("GET",)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_write_after_the_harvest_through_the_old_translation_needs_its_flush(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    set_log(o, LOG)
    write(o, 0, BASE)
    assert o.get(0) == {0}
    assert o.through_tlb(0, BASE) == bool(mutants)
    assert o.lost() == ({(0, 0)} if mutants else set())


@pytest.mark.parametrize("mutants", [(), ("enable",)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_write_after_enabling_through_the_old_translation_needs_its_flush(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    write(o, 0, BASE)
    set_log(o, LOG)
    assert o.through_tlb(0, BASE) == bool(mutants)
    assert o.lost() == ({(0, 0)} if mutants else set())


@pytest.mark.parametrize("mutants", [(), ("read last",)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_write_between_protect_and_flush_is_in_the_page_that_userspace_reads(platform, mutants):
    o = new_oracle(platform, mutants=mutants)
    set_log(o, LOG)
    write(o, 0, BASE)
    stale = []
    o.meanwhile = lambda: stale.append(o.through_tlb(0, BASE))
    assert o.get(0) == {0}
    assert stale == [True, True, True]
    assert o.lost() == ({(0, 0)} if mutants else set())


@pytest.mark.parametrize("mutants", [(), ("bit first",)])
@pytest.mark.parametrize("platform", PLATFORMS)
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


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_write_through_any_view_of_a_gfn_is_reported_under_the_gfn(platform):
    """A harvest re-arms all views: of L2 by W, whatever the hardware logs of L1."""
    o = new_oracle(platform)
    o.views = 3
    for view in range(3):
        write(o, 0, BASE + view * SPAN)
    set_log(o, LOG)
    for view in (0, 1, 2, 1, 0):
        write(o, 0, BASE + view * SPAN)
        assert o.get(0) == {0}
        assert o.lost() == set()
