"""What a guest does to page tables that KVM shadows: when it takes effect, what it costs, what of it is dirty."""

import pytest
from conftest import LOG, PAGE, PLATFORMS, pages_of
from programs.nest import L2, TABLES_GFN, Nest, kind_of, violation_of

import spte
from spte.access import EXEC, READ, RWX, WRITE
from spte.bits import PFN_MASK

NESTED = [name for name in PLATFORMS if name != "shadow"]
WITH_DIRTY = [name for name in PLATFORMS if "noad" not in name]
DIRTY = {"ept": 1 << 9, "npt": 1 << 6, "long": 1 << 6}
NO_FRAME = ~int(PFN_MASK)


class Changed(Nest):
    """vCPU 0 runs on the tables, vCPU 1 changes them, with nothing between it and their memory."""

    def __init__(self, platform, **more):
        super().__init__(platform, vcpus=2, **more)
        self.vm.vcpus[1].write([TABLES_GFN + 63])
        self.enter(0)

    def change(self, page, value, *, flush=True):
        address, old, _ = self.entry(page)
        self.put(address, value(old))
        if flush:
            self.flush()

    def put(self, address, value):
        assert self.vm.vcpus[1].store(address, value) is None
        assert int(self.table_memory.table((address >> 12) - TABLES_GFN)[address % PAGE // 8]) == value
        self.vm.check()

    def flush(self):
        """What the guest's flush makes KVM do: new roots for L2, a sync for a guest of shadow paging."""
        vcpu = self.vm.vcpus[0]
        if vcpu.in_l2:
            self.leave(0)
            vcpu.invept()
        self.enter(0)
        self.read_as_l2([])  # shadow paging syncs when the vCPU runs

    def refused(self, kind, page, view=0):
        """Access a page that the tables do not allow to be so accessed; what they allow."""
        vcpu = self.vm.vcpus[0]
        stop = vcpu.run(self.at([page], view), [kind])
        self.vm.check()
        assert (stop.reason, stop.index, stop.gfn, stop.kind) == (violation_of(self.platform), 0, self.at([page], view)[0], kind)
        if self.platform != "shadow":
            assert not vcpu.in_l2
            self.enter(0)
        return stop.allows

    def link(self, page, above=1):
        """Address and value of the entry that links to the table of a page's entry, or of one further up."""
        pages, level, _ = self.tables.walk(L2 + page)
        at = level + above
        address = (pages[4 - at] << 12) + 8 * (L2 + page >> 9 * (at - 1) & 511)
        return address, int(self.table_memory.table(pages[4 - at] - TABLES_GFN)[address % PAGE // 8])

    def emulated(self):
        return self.stats("pf_emulate", "vcpu1")


# -- the last entry, after a flush


def test_a_page_that_the_guest_write_protects_is_not_dirty_until_it_is_granted_and_written(platform):
    nest = Changed(platform)
    nest.write_as_l2([5])
    nest.set_flags(LOG)
    nest.change(5, lambda entry: nest.tables.permissions(entry, READ | EXEC))
    nest.read_as_l2([5])
    assert nest.refused(spte.WRITE, 5) == READ | EXEC
    assert nest.harvest() == []
    nest.change(5, lambda entry: nest.tables.permissions(entry, RWX))
    nest.harvest()
    nest.write_as_l2([5])
    assert nest.harvest() == [5]


def test_execution_is_the_guests_to_take(platform):
    nest = Changed(platform)
    assert nest.vm.vcpus[0].exec(nest.at([5])) is None
    nest.change(5, lambda entry: nest.tables.permissions(entry, READ | WRITE))
    assert nest.refused(spte.EXEC, 5) == READ | WRITE
    nest.write_as_l2([5])


@pytest.mark.parametrize("platform", [name for name in NESTED if name.startswith("ept")])
def test_an_execute_only_page_of_l1s_ept_can_not_be_read(platform):
    nest = Changed(platform)
    nest.change(5, lambda entry: nest.tables.permissions(entry, EXEC))
    assert nest.vm.vcpus[0].exec(nest.at([5])) is None
    assert nest.refused(spte.READ, 5) == EXEC


@pytest.mark.parametrize("level", [1, 2])
def test_a_page_that_is_mapped_elsewhere_is_dirty_where_it_lands(platform, level):
    nest = Changed(platform, kind="thp", level=level)
    nest.write_as_l2([5])
    nest.set_flags(LOG)
    nest.harvest()
    to = 512 + (5 if level == 1 else 0)
    nest.change(5, lambda entry: entry & NO_FRAME | nest.base + to << 12)
    nest.write_as_l2([5])
    assert nest.harvest() == [512 + 5]
    assert nest.reaches(L2 + 5)[0] == 512 + 5


@pytest.mark.parametrize("level", [1, 2])
def test_a_page_that_is_unmapped_faults_until_it_is_mapped_again(platform, level):
    nest = Changed(platform, kind="thp", level=level, views=2)
    for view in range(2):
        nest.write_as_l2([5], view=view)
    nest.set_flags(LOG)
    nest.harvest()
    _, entry, _ = nest.entry(5)
    nest.change(5, lambda entry: 0)
    for kind in (spte.READ, spte.WRITE, spte.EXEC):
        assert nest.refused(kind, 5) == 0
    assert nest.harvest() == []
    nest.write_as_l2([5], view=1)
    assert nest.harvest() == [5]
    nest.change(5, lambda absent: entry)
    nest.write_as_l2([5])
    assert nest.harvest() == [5]


def test_without_a_flush_the_old_translation_stays(platform):
    nest = Changed(platform)
    nest.write_as_l2([5])
    nest.change(5, lambda entry: entry & NO_FRAME | nest.base + 600 << 12, flush=False)
    assert nest.reaches(L2 + 5)[0] == 5
    nest.write_as_l2([5])
    nest.flush()
    nest.write_as_l2([5])
    assert nest.reaches(L2 + 5)[0] == 600


# -- what a store costs


def test_a_last_table_is_out_of_step_after_its_first_store_and_protected_again_by_the_flush(platform):
    nest = Changed(platform)
    nest.write_as_l2([5])
    for _ in range(2):
        costs = []
        for page in (5, 6, 5):
            before = nest.faults(1)
            nest.change(page, lambda entry: entry, flush=False)
            costs.append(nest.faults(1) - before)
        assert costs == [1, 0, 0]
        nest.flush()
    assert nest.emulated() == 0


def test_a_write_to_a_table_above_is_emulated_and_in_effect_at_once(platform):
    nest = Changed(platform)
    nest.write_as_l2([5, 600])
    nest.set_flags(LOG)
    address, link = nest.link(5)
    nest.put(address, 0)
    assert nest.emulated() == 1
    assert nest.refused(spte.WRITE, 5) == 0
    nest.put(address, link)
    assert nest.emulated() == 2
    nest.write_as_l2([5])
    nest.write_as_l2([600])
    assert nest.harvest() == [5, 600]


def test_another_table_behind_a_link_is_in_effect_at_once(platform):
    nest = Changed(platform)
    nest.write_as_l2([5, 512 + 5])
    (address, _), (_, other) = nest.link(5), nest.link(512)
    nest.put(address, other)
    nest.set_flags(LOG)
    nest.write_as_l2([5])
    assert nest.harvest() == [512 + 5]


@pytest.mark.parametrize("above", [1, 2])
def test_three_writes_in_a_row_make_a_table_above_an_ordinary_page(platform, above):
    nest = Changed(platform)
    nest.write_as_l2([5])
    address, link = nest.link(5, above)
    for _ in range(5):
        nest.put(address, link)
    assert nest.emulated() == 3
    nest.flush()
    nest.write_as_l2([5])
    nest.put(address, link)
    assert nest.emulated() == 4


def test_use_of_a_table_above_between_writes_keeps_it_shadowed(platform):
    nest = Changed(platform)
    nest.write_as_l2([5])
    address, link = nest.link(5)
    for n in range(5):
        nest.put(address, link)
        nest.write_as_l2([5])
        assert nest.emulated() == n + 1


def test_every_page_that_a_guest_stores_its_tables_to_is_dirty(platform):
    nest = Changed(platform)
    nest.write_as_l2([5, 600])
    nest.log_tables()
    for at in (nest.entry(5)[0], nest.link(5)[0], nest.entry(600)[0]):
        for _ in range(2):
            nest.put(at, int(nest.table_memory.table((at >> 12) - TABLES_GFN)[at % PAGE // 8]))
            assert pages_of(nest.vm.get_dirty_log(1)) == {(at >> 12) - TABLES_GFN}
        nest.flush()


# -- the guest's own dirty bits


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("platform", WITH_DIRTY)
def test_a_page_without_the_guests_dirty_bit_is_mapped_read_only_until_its_first_write_sets_it(platform, level):
    nest = Changed(platform, kind="thp", level=level)
    nest.set_flags(LOG)
    nest.log_tables()
    nest.change(5, lambda entry: nest.tables.unused(entry, accessed=False))
    address, before, _ = nest.entry(5)
    nest.read_as_l2([5])
    nest.vm.get_dirty_log(1)
    assert nest.harvest() == []
    assert nest.entry(5)[1] == before
    nest.write_as_l2([5])
    assert nest.harvest() == [5]
    assert nest.entry(5)[1] == before | DIRTY[kind_of(platform)]
    assert pages_of(nest.vm.get_dirty_log(1)) == {(address >> 12) - TABLES_GFN}
    nest.write_as_l2([5])
    assert nest.harvest() == [5]
    assert pages_of(nest.vm.get_dirty_log(1)) == set()


def test_ept_without_accessed_and_dirty_bits_is_left_as_it_is():
    nest = Changed("ept-pml", ad=False)
    nest.change(5, lambda entry: nest.tables.unused(entry, accessed=True))
    before = nest.entry(5)
    nest.write_as_l2([5])
    assert nest.entry(5) == before
