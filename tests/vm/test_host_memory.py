"""Host memory under a guest: what a KVM fault finds there, and what madvise does to it, rule by rule."""

import errno

import pytest
from conftest import LOG, PAGE
from programs.host_machine import BASE, KINDS, ONE_FAULT, RO, Machine

import spte
from spte import mm

# -- what a fault finds


def test_a_read_of_an_untouched_private_page_maps_the_zero_page_and_is_not_dirty():
    m = Machine(populate=False, flags=LOG)
    assert m.read(3) == ONE_FAULT
    assert m.leafs() == {3: "825"}
    assert m.dirty() == set()


def test_a_write_of_an_untouched_private_page_costs_one_fault_and_no_flush():
    m = Machine(populate=False, flags=LOG)
    assert m.write(3) == ONE_FAULT
    assert (m.leafs(), m.flushes(), m.dirty()) == ({3: "e67"}, 0, {3})


def test_a_write_of_a_mapped_zero_page_faults_twice_and_flushes_once():
    m = Machine(populate=False, flags=LOG)
    m.read(3)
    assert m.write(3) == {"pf_taken": 2, "pf_fixed": 1}
    assert (m.leafs(), m.flushes(), m.dirty()) == ({3: "e67"}, 1, {3})


def test_a_write_of_a_zero_page_that_no_spte_maps_faults_twice_without_a_flush():
    """Its copy calls the notifier, SPTE or not, and the fault is tried again."""
    m = Machine(populate=False)
    m.read(3)
    m.vm.set_memory_region(9, 1 << 40, PAGE, spte.Backing("4k", PAGE))
    m.vm.set_memory_region(9, 0, 0)  # drops every SPTE, the host's zero page stays
    assert m.write(3) == {"pf_taken": 2, "pf_fixed": 1}
    assert (m.leafs(), m.flushes()) == ({3: "e67"}, 0)


def test_a_copy_of_a_zero_page_drops_it_at_every_gpa_that_maps_it():
    m = Machine(populate=False)
    m.set_flags(0, slot=1, base=8 * BASE)
    m.vm.vcpus[0].read([8 * BASE + 3])
    assert m.write(3) == {"pf_taken": 2, "pf_fixed": 1}
    assert (m.leafs(), m.flushes()) == ({3: "e67"}, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_of_an_own_page_maps_it_writable_and_is_dirty_while_the_slot_logs(kind):
    m = Machine(kind, flags=LOG)
    m.read(3)
    assert (m.leafs(), m.dirty()) == ({3: "e67"}, {3})


def test_a_read_of_untouched_shared_memory_maps_it_writable():
    m = Machine("shm", populate=False)
    assert m.read(3) == ONE_FAULT
    assert m.leafs() == {3: "e67"}


@pytest.mark.parametrize("kind", ["thp", "hugetlb2m"])
def test_a_read_of_untouched_huge_memory_maps_2_mib_writable(kind):
    m = Machine(kind, populate=False)
    assert m.read(515) == ONE_FAULT
    assert m.leafs() == {512: "ee7"}
    assert m.memory.huge_bytes == 2 << 20


def test_a_read_in_a_thp_block_that_is_not_empty_maps_the_zero_page():
    m = Machine("thp")
    mm.madvise(m.memory, 5, 2)
    m.read(5)
    assert m.leafs() == {5: "825"}
    m.write(6)
    assert m.leafs() == {5: "825", 6: "e67"}


def test_a_thp_block_that_sticks_out_of_the_mapping_is_never_huge():
    m = Machine("thp", npages=515, populate=False)
    m.read(0, 512)
    m.write(513)
    assert m.leafs() == {0: "ee7", 512: "825", 513: "e67"}


def test_a_readonly_slot_maps_writable_pages_readonly_and_never_marks():
    m = Machine(flags=RO | LOG)
    assert m.read(3) == ONE_FAULT
    assert m.vm.vcpus[0].write([BASE + 3]).reason == "mmio"
    assert (m.leafs(), m.dirty()) == ({3: "825"}, set())


# -- madvise


def test_dontneed_drops_the_range_with_one_flush_and_keeps_the_dirty_log():
    m = Machine(flags=LOG)
    m.write(*range(8))
    assert m.flushes_of(mm.madvise, m.memory, 2, 4) == 1
    assert sorted(m.leafs()) == [0, 1, 6, 7]
    assert m.dirty() == set(range(8))
    m.read(2)
    assert m.leafs()[2] == "825"


def test_dontneed_of_what_nobody_maps_does_not_flush():
    m = Machine()
    assert m.flushes_of(mm.madvise, m.memory, 2, 4) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_notifier_drops_the_spte_at_every_gpa_with_one_flush(kind):
    m = Machine(kind)
    m.set_flags(0, slot=1, base=8 * BASE)
    m.write(3)
    m.vm.vcpus[0].read([8 * BASE + 3])
    assert m.flushes_of(mm.madvise, m.memory, 0, 512) == 1
    assert m.leafs() == {}


def test_dontneed_of_shared_memory_keeps_the_contents():
    m = Machine("shm")
    m.write(3)
    mm.madvise(m.memory, 3, 1)
    assert m.leafs() == {}
    assert m.read(3) == ONE_FAULT
    assert m.leafs() == {3: "e67"}


@pytest.mark.parametrize("kind", ["thp", "hugetlb2m"])
def test_dontneed_of_a_whole_block_lets_the_next_fault_make_a_huge_page(kind):
    m = Machine(kind)
    m.write(0, 512)
    assert m.flushes_of(mm.madvise, m.memory, 512, 512) == 1
    assert m.memory.huge_bytes == 2 << 20
    assert m.leafs() == {0: "ee7"}
    m.read(513)
    assert m.memory.huge_bytes == 4 << 20
    assert m.leafs() == {0: "ee7", 512: "ee7"}


def test_dontneed_of_a_whole_block_while_logging_refills_by_4_kib_and_collapses_later():
    m = Machine("thp")
    m.write(0)
    m.set_flags(LOG)
    mm.madvise(m.memory, 0, 512)
    m.write(3)
    assert m.leafs() == {3: "e67"}
    m.set_flags(0)
    m.write(3)
    assert m.leafs() == {0: "ee7"}


def test_dontneed_of_part_of_a_huge_block_splits_it_for_good_with_one_flush():
    m = Machine("thp")
    m.write(0, 512)
    assert m.flushes_of(mm.madvise, m.memory, 5, 1) == 1
    assert m.leafs() == {512: "ee7"}
    assert m.memory.huge_bytes == 2 << 20
    m.read(4, 5)
    assert m.leafs() == {4: "e67", 5: "825", 512: "ee7"}
    mm.madvise(m.memory, 0, 512)
    m.read(0)
    assert m.leafs() == {0: "825", 512: "ee7"}


def test_dontneed_of_part_of_a_huge_block_drops_its_4_kib_sptes_outside_the_range_too():
    m = Machine("thp", flags=LOG)
    m.write(0, 5, 511, 512)
    assert m.flushes_of(mm.madvise, m.memory, 5, 1) == 2  # the range, then the block: a flush for each that dropped something
    assert sorted(m.leafs()) == [512]


def test_dontneed_in_a_split_block_drops_just_the_range():
    m = Machine("thp")
    mm.madvise(m.memory, 5, 1)
    m.write(0, 1, 2)
    mm.madvise(m.memory, 1, 1)
    assert sorted(m.leafs()) == [0, 2]


def test_a_block_that_the_host_has_split_stays_4_kib_after_logging():
    m = Machine("thp", flags=LOG)
    mm.madvise(m.memory, 5, 1)
    m.write(0, 512)
    m.set_flags(0)
    assert sorted(m.leafs()) == [0]
    m.write(512)
    assert m.leafs() == {0: "e67", 512: "ee7"}


def test_free_drops_the_range_and_keeps_the_contents():
    m = Machine(flags=LOG)
    m.write(2, 3)
    assert m.flushes_of(mm.madvise, m.memory, 2, 2, mm.FREE) == 1
    m.dirty()
    m.read(2)
    assert (m.leafs(), m.dirty()) == ({2: "e67"}, {2})


@pytest.mark.parametrize("advice", [mm.COLD, mm.PAGEOUT])
@pytest.mark.parametrize(("kind", "first", "count"), [("4k", 0, 6), ("thp", 0, 512), ("shm", 0, 6)])
def test_cold_and_pageout_change_nothing_unless_they_split(kind, first, count, advice):
    m = Machine(kind)
    m.write(0, 1)
    before = m.leafs()
    assert m.flushes_of(mm.madvise, m.memory, first, count, advice) == 0
    assert m.leafs() == before


@pytest.mark.parametrize("advice", [mm.COLD, mm.PAGEOUT])
def test_cold_of_part_of_a_huge_block_splits_it_and_keeps_its_pages(advice):
    m = Machine("thp")
    m.write(0, 512)
    assert m.flushes_of(mm.madvise, m.memory, 512, 4, advice) == 1
    assert (m.leafs(), m.memory.huge_bytes) == ({0: "ee7"}, 2 << 20)
    m.read(512, 600)
    assert m.leafs() == {0: "ee7", 512: "e67", 600: "e67"}


def test_cold_across_two_huge_blocks_flushes_once_for_each():
    m = Machine("thp")
    m.write(0, 512)
    assert m.flushes_of(mm.madvise, m.memory, 500, 24, mm.COLD) == 2


@pytest.mark.parametrize(
    ("kind", "first", "count", "advice"),
    [
        ("hugetlb2m", 0, 511, mm.DONTNEED), ("hugetlb2m", 1, 512, mm.DONTNEED), ("hugetlb2m", 0, 512, mm.FREE),
        ("hugetlb2m", 0, 512, mm.COLD), ("shm", 0, 1, mm.FREE), ("4k", 1020, 5, mm.DONTNEED), ("4k", -1, 1, mm.DONTNEED), ("4k", 0, 1, 9),
    ],
)  # fmt: skip
def test_advice_that_such_memory_does_not_take_is_refused_and_changes_nothing(kind, first, count, advice):
    m = Machine(kind)
    m.write(0)
    before = m.leafs(), m.flushes(), m.memory.huge_bytes
    with pytest.raises(spte.KvmError, match="EINVAL") as refused:
        mm.madvise(m.memory, first, count, advice)
    assert refused.value.errno == errno.EINVAL
    assert (m.leafs(), m.flushes(), m.memory.huge_bytes) == before
