"""Roots of guests that run guests: kept over switches, found again after a flush, protected while nobody runs on them."""

import pytest
from conftest import LOG, PLATFORMS
from programs.nest import L2, Nest

import spte
from spte.errors import ClosedError, NestedError

NESTED = [name for name in PLATFORMS if name != "shadow"]


@pytest.fixture(params=NESTED)
def nested(request):
    """A platform on which L1 gives L2 tables of their own."""
    return request.param


def test_entering_again_costs_no_fault(platform):
    nest = Nest(platform, views=2)
    nest.enter()
    nest.write_as_l2(range(64))
    nest.leave()
    nest.write(range(64))
    before = nest.faults()
    for _ in range(2):
        nest.enter()
        nest.write_as_l2(range(64))
        nest.leave()
        nest.write(range(64))
    assert nest.faults() == before


@pytest.mark.parametrize("into_l2", [True, False])
def test_a_switch_ends_the_run(platform, into_l2):
    """What follows runs on the other root, and what the CPU had logged is in the log."""
    nest = Nest(platform)
    nest.set_flags(LOG)
    run = nest.vm.vcpus[0].run
    if into_l2:
        assert run([nest.base + 1], [spte.WRITE], leave=False) is None
        nest.enter()
    else:
        nest.enter()
        assert run(nest.at([1]), [spte.WRITE], leave=False) is None
        nest.leave()
    nest.vm.check()
    assert nest.harvest() == [1]
    assert run(nest.at([2]) if into_l2 else [nest.base + 2], [spte.WRITE]) is None
    assert nest.harvest() == [2]


def test_another_set_of_tables_is_found_again_without_a_fault(nested):
    nest = Nest(nested)
    nest.tables.map(L2, nest.base, 64, root=nest.tables.add_root())
    for first in (True, False):
        for root in range(2):
            before = nest.faults()
            nest.vm.vcpus[0].enter_l2(nest.tables.address(root))
            nest.write_as_l2(range(64))
            assert (nest.faults() > before) == first
            nest.leave()


def test_logging_protects_what_an_l2_maps_that_does_not_run(platform):
    nest = Nest(platform)
    nest.enter()
    nest.write_as_l2([5])
    nest.leave()
    nest.set_flags(LOG)
    nest.enter()
    nest.write_as_l2([5])
    assert nest.harvest() == [5]


@pytest.mark.parametrize("single", [True, False])
def test_invept_finds_the_shadow_pages_again(nested, single):
    nest = Nest(nested)
    nest.enter()
    nest.write_as_l2(range(64))
    nest.leave()
    nest.vm.vcpus[0].invept(nest.tables.address() if single else None)
    before = nest.faults()
    nest.enter()
    nest.write_as_l2(range(64))
    assert nest.faults() == before


def test_an_ioctl_ends_a_run_in_the_guest():
    nest = Nest("ept-pml")
    nest.set_flags(LOG)
    vcpu = nest.vm.vcpus[0]
    assert vcpu.run([nest.base + 1], [spte.WRITE], leave=False) is None
    assert nest.harvest() == [1]
    assert vcpu.run([nest.base + 1], [spte.WRITE], leave=False) is None
    nest.vm.close()
    with pytest.raises(ClosedError):
        vcpu.write([nest.base + 1])


def test_a_vmcb_is_amds():
    nest = Nest("ept-pml")
    vcpu = nest.vm.vcpus[0]
    with pytest.raises(NestedError, match="AMD"):
        vcpu.enter_l2(nest.tables.address(), vmcb=nest.base << 12)


def test_many_unsync_tables_are_synced_in_batches_that_share_flushes():
    """Two batches (13 tables beside the three pages on the way to them, and 7): each is protected, the last one synced, by a flush."""
    nest = Nest("npt", npages=20 * 512)
    pages = range(0, 20 * 512, 512)
    nest.enter()
    nest.write_as_l2(pages)
    nest.leave()
    for page in pages:
        place, value, _ = nest.entry(page)
        nest.vm.vcpus[0].store(place, nest.tables.permissions(value, 5))
    before = nest.stats("remote_tlb_flush_requests", "vm")
    nest.enter()
    assert nest.stats("remote_tlb_flush_requests", "vm") - before == 3
