"""A 64-bit guest without EPT or NPT: KVM shadows its own page tables, and what it writes is reported under the gfn."""

import pytest
from conftest import LOG
from programs.nest import L2, Nest

import spte
from spte.access import EXEC, READ, RWX, WRITE

VIEWS = 3


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("kind", ["4k", "thp", "hugetlb2m"])
def test_one_gfn_at_several_addresses_is_one_page_of_the_log(policy, kind, level):
    nest = Nest("shadow", policy, kind=kind, level=level, views=VIEWS)
    nest.enter()
    nest.set_flags(LOG)
    for pages in ([5], [5, 511, 512], [1023]):
        for view in range(VIEWS):
            nest.write_as_l2(pages, view=view)
        nest.vm.check()
        assert nest.harvest() == pages
        nest.write_as_l2(pages[:1], view=VIEWS - 1)
        assert nest.harvest() == pages[:1]


@pytest.mark.parametrize(("kind", "level", "leaf"), [("4k", 1, 1), ("4k", 2, 1), ("thp", 1, 1), ("thp", 2, 2), ("hugetlb2m", 2, 2)])
def test_a_leaf_is_as_large_as_the_guests_page_and_the_hosts(kind, level, leaf):
    nest = Nest("shadow", kind=kind, level=level)
    nest.enter()
    nest.write_as_l2([5])
    assert nest.reaches(L2 + 5) == (5, leaf)


def test_paging_off_on_and_off_again_is_the_same_memory():
    nest = Nest("shadow")
    nest.set_flags(LOG)
    for n in range(3):
        nest.write([n])
        nest.enter()
        nest.write_as_l2([10 + n])
        nest.vm.check()
        assert nest.harvest() == [n, 10 + n]
        nest.leave()
        nest.vm.check()
    with pytest.raises(spte.KvmError, match="outside the 32 bits"):
        nest.vm.vcpus[0].write([1 << 20])


@pytest.mark.parametrize(("perm", "kind", "allows"), [(READ | EXEC, WRITE, READ | EXEC), (READ, EXEC, READ), (0, WRITE, READ)])
def test_what_the_guests_tables_do_not_allow_is_a_page_fault_of_the_guest(perm, kind, allows):
    nest = Nest("shadow")
    nest.tables.map(L2, nest.base, perm=perm)
    nest.set_flags(LOG)
    nest.enter()
    vcpu = nest.vm.vcpus[0]
    for _ in range(2):
        stop = vcpu.run(nest.at([1, 0, 2]), [spte.READ, kind, spte.READ])
        assert stop == spte.Exit("page_fault", 1, L2, kind, allows)
        nest.vm.check()
        assert 0 not in nest.harvest()
    absent = L2 + 10 * nest.span
    assert vcpu.read([absent]) == spte.Exit("page_fault", 0, absent, spte.READ, 0)
    nest.tables.map(L2, nest.base, perm=RWX)
    nest.enter()
    nest.write_as_l2([0])
    assert nest.harvest() == [0]


def test_l1_and_l2_of_one_address_space_share_no_page():
    nest = Nest("shadow")
    nest.set_flags(LOG)
    vcpu = nest.vm.vcpus[0]
    nest.enter()
    nest.write_as_l2([5])
    assert nest.harvest() == [5]
    vcpu.enter_l2()
    before = nest.faults()
    nest.write_as_l2([5])
    assert nest.faults() - before == 1
    assert nest.harvest() == [5]
    vcpu.leave_l2()
    before = nest.faults()
    nest.write_as_l2([5])
    assert nest.faults() - before == 1
    assert nest.harvest() == [5]
