"""The kernel's selftest and the kvm-unit-tests of nested dirty logging as scenarios, each under its name."""

import pytest
from conftest import LOG, PAGE, PLATFORMS, pages_of
from programs.nest import TABLES_GFN, TABLES_PAGES, host_page, kind_of

import spte
from spte.access import EXEC, READ, RWX, WRITE
from spte.guest_tables import GuestTables

A, D = 1 << 8, 1 << 9
MEM_GFN, MEM_PAGES = 0xC0000, 3
FILL = 0xAA
NESTED = [name for name in PLATFORMS if name != "shadow"]
WITH_AD = [name for name in PLATFORMS if name.startswith("ept") and "noad" not in name]


def new_guest(platform, gfn, npages, flags=0):
    """A VM, host memory of its slot 1 and of its slot 0, and tables for its guest in the latter."""
    vm = spte.VM(platform)
    memory, table_memory = spte.Backing("4k", npages * PAGE), spte.Backing("4k", TABLES_PAGES * PAGE)
    vm.set_memory_region(0, TABLES_GFN * PAGE, TABLES_PAGES * PAGE, table_memory)
    vm.set_memory_region(1, gfn * PAGE, npages * PAGE, memory, flags=flags)
    return vm, memory, table_memory, GuestTables(table_memory, TABLES_GFN * PAGE, kind_of(platform))


# -- vmx_dirty_log_test ---------------------------------------------------------------------------------------------------


class VmxDirtyLogTest:
    """The selftest's host: what L2 writes is followed to the host page that it lands in."""

    def __init__(self, platform):
        self.vm, self.memory, _, self.tables = new_guest(platform, MEM_GFN, MEM_PAGES, LOG)
        self.vcpu = self.vm.vcpus[0]
        self.fill()

    def fill(self):
        self.content = [FILL] * MEM_PAGES

    def read(self, gfn):
        assert self.vcpu.read([gfn]) is None

    def write(self, gfn):
        assert self.vcpu.write([gfn]) is None
        self.content[host_page(self.vm, gfn)[0] - self.memory.hpage] = 1

    def sync(self, dirty):
        bits = pages_of(self.vm.get_dirty_log(1))
        assert bits == ({0} if dirty else set())
        assert self.content == [1 if dirty else FILL, FILL, FILL]
        self.vm.check()
        self.fill()

    def l2(self, a, b):
        self.read(a)
        self.write(a)
        self.sync(True)
        self.sync(False)
        for _ in range(2):
            self.write(b)
            self.sync(True)
        self.sync(False)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_vmx_dirty_log_test_without_ept(platform):
    test = VmxDirtyLogTest(platform)
    if platform == "shadow":
        test.tables.map(MEM_GFN, MEM_GFN, MEM_PAGES)
        test.vcpu.load_cr3(test.tables.address())
    test.sync(False)
    test.vcpu.enter_l2()
    test.l2(MEM_GFN, MEM_GFN)
    test.vcpu.leave_l2()
    test.sync(False)


@pytest.mark.parametrize("platform", NESTED)
def test_vmx_dirty_log_test_with_ept(platform):
    test = VmxDirtyLogTest(platform)
    for alias in (1, 2):
        test.tables.map(MEM_GFN + alias, MEM_GFN)
    test.sync(False)
    test.vcpu.enter_l2(test.tables.address())
    test.l2(MEM_GFN + 1, MEM_GFN + 2)
    test.vcpu.leave_l2()
    test.sync(False)


# -- kvm-unit-tests: PML --------------------------------------------------------------------------------------------------

DATA_GFN, DATA_PAGES, PML_PAGE, DATA_PAGE1, DATA_PAGE2, PTE_PAGE = 512, 8, 2, 3, 4, 5
EMPTY, FULL, ROUNDS = 511, 0xFFFF, 513


class UnitTest:
    """L1 of the kvm-unit-tests: its memory is its guest's, one to one; nothing is accessed or dirty before."""

    def __init__(self, platform, *, ad=True, pml=False):
        self.vm, self.memory, self.table_memory, self.tables = new_guest(platform, DATA_GFN, DATA_PAGES)
        self.vcpu, self.ad, self.pml = self.vm.vcpus[0], ad, (DATA_GFN + PML_PAGE) * PAGE if pml else None
        self.tables.map(DATA_GFN, DATA_GFN, DATA_PAGES, accessed=False, dirty=False)

    def entries(self, page):
        """The entries on the way to a page, the last one first."""
        gfn = DATA_GFN + page
        tables, _, _ = self.tables.walk(gfn)
        at = {table: gfn >> 9 * (4 - n) - 9 & 511 for n, table in enumerate(tables)}
        return [(table * PAGE + 8 * i, int(self.table_memory.table(table - TABLES_GFN)[i])) for table, i in reversed(at.items())]

    def used(self, page):
        """A and D of each level, the last one first."""
        return [(bool(value & A), bool(value & D)) for _, value in self.entries(page)]

    def clear(self, *pages, perm=RWX):
        """Let L1 take A and D from the whole way to some pages, and set the last entry's permissions; then INVEPT."""
        for page in pages:
            for level, (address, value) in enumerate(self.entries(page)):
                self.vcpu.store(address, self.tables.permissions(value, RWX if level else perm) & ~(A | D))
        self.vcpu.invept()

    def l2(self, *accesses):
        """Run L2 through ``(page, kind)``; what L1 sees it exit for."""
        self.vcpu.enter_l2(self.tables.address(), ad=self.ad, pml=self.pml)
        stop = self.vcpu.run([DATA_GFN + page for page, _ in accesses], [kind for _, kind in accesses])
        self.vm.check()
        if stop is not None:
            assert not self.vcpu.in_l2
            return stop.reason
        self.vcpu.leave_l2()
        return "vmcall"


@pytest.mark.parametrize("platform", WITH_AD)
def test_pml_dirty_gpa_logging(platform):
    test = UnitTest(platform, pml=True)
    assert test.vcpu.l1_pml_index == EMPTY
    assert test.l2((DATA_PAGE2, spte.WRITE)) == "vmcall"
    assert test.vcpu.l1_pml_index == EMPTY - 1
    assert int(test.memory.table(PML_PAGE)[EMPTY]) == (DATA_GFN + DATA_PAGE2) * PAGE


@pytest.mark.parametrize("platform", WITH_AD)
def test_pml_full_event(platform):
    test = UnitTest(platform, pml=True)
    reasons = []
    for _ in range(ROUNDS):
        reasons.append(test.l2((DATA_PAGE2, spte.WRITE)))
        if reasons[-1] == "vmcall":
            test.clear(DATA_PAGE2)
    assert reasons == ["vmcall"] * (ROUNDS - 1) + ["pml_full"]
    assert test.vcpu.l1_pml_index == FULL
    assert set(test.memory.table(PML_PAGE).tolist()) == {(DATA_GFN + DATA_PAGE2) * PAGE}
    assert test.used(DATA_PAGE2)[0][1] is False
    test.vcpu.l1_pml_index = EMPTY
    assert test.l2((DATA_PAGE2, spte.WRITE)) == "vmcall"
    assert test.vcpu.l1_pml_index == EMPTY - 1
    assert test.used(DATA_PAGE2)[0][1] is True


# -- kvm-unit-tests: EPT A/D ----------------------------------------------------------------------------------------------

IN_LINKS = [(True, False)] * 3
UNUSED, READ_ONLY, WRITTEN = [(False, False)] * 4, [(True, False), *IN_LINKS], [(True, True), *IN_LINKS]


@pytest.mark.parametrize("platform", WITH_AD)
def test_ept_ad(platform):
    test = UnitTest(platform)
    walk = (PTE_PAGE, spte.WRITE)  # the CPU's walk of L2's own tables counts as a write
    assert test.l2(walk, (DATA_PAGE1, spte.READ), walk, (DATA_PAGE2, spte.WRITE)) == "vmcall"
    assert (test.used(PTE_PAGE), test.used(DATA_PAGE1), test.used(DATA_PAGE2)) == (WRITTEN, READ_ONLY, WRITTEN)
    test.clear(PTE_PAGE, DATA_PAGE1, DATA_PAGE2)
    assert (test.used(PTE_PAGE), test.used(DATA_PAGE1), test.used(DATA_PAGE2)) == (UNUSED, UNUSED, UNUSED)
    assert test.l2(walk, (DATA_PAGE1, spte.WRITE)) == "vmcall"
    assert (test.used(PTE_PAGE), test.used(DATA_PAGE1), test.used(DATA_PAGE2)[0]) == (WRITTEN, WRITTEN, (False, False))


@pytest.mark.parametrize(("perm", "kind"), [(0, spte.READ), (READ, spte.WRITE), (READ | WRITE, spte.EXEC)])
@pytest.mark.parametrize("platform", WITH_AD)
def test_ept_ad_bits_do_not_change_on_an_access_that_faults(platform, perm, kind):
    test = UnitTest(platform)
    for known in (False, True):  # not mapped in the shadow pages, then mapped
        test.clear(DATA_PAGE1, perm=perm)
        if known and perm:
            assert test.l2((DATA_PAGE1, spte.READ)) == "vmcall"
        before = test.used(DATA_PAGE1)
        assert test.l2((DATA_PAGE1, kind)) == "ept_violation"
        assert test.used(DATA_PAGE1) == before


@pytest.mark.parametrize("platform", [name for name in PLATFORMS if name.startswith("ept")])
def test_ept_ad_off_leaves_the_bits_alone(platform):
    test = UnitTest(platform, ad=False)
    assert test.l2((DATA_PAGE1, spte.READ), (DATA_PAGE2, spte.WRITE)) == "vmcall"
    assert (test.used(DATA_PAGE1), test.used(DATA_PAGE2)) == (UNUSED, UNUSED)


# -- kvm-unit-tests: ept_access_test_paddr_* ------------------------------------------------------------------------------

PERMISSIONS = {"not_present": 0, "read_only": READ, "read_write": READ | WRITE, "read_execute": READ | EXEC}


@pytest.mark.parametrize("perm", PERMISSIONS)
@pytest.mark.parametrize("platform", WITH_AD)
def test_ept_access_test_paddr_with_ad_every_walk_is_a_write(platform, perm):
    test = UnitTest(platform)
    test.clear(PTE_PAGE, perm=PERMISSIONS[perm])
    allowed = PERMISSIONS[perm] & WRITE
    for kind in (spte.READ, spte.WRITE, spte.EXEC):
        assert test.l2((PTE_PAGE, spte.WRITE), (DATA_PAGE1, kind)) == ("vmcall" if allowed else "ept_violation")
    assert test.used(PTE_PAGE) == (WRITTEN if allowed else UNUSED)
    assert test.used(DATA_PAGE1)[0] == (bool(allowed), bool(allowed))


@pytest.mark.parametrize("perm", PERMISSIONS)
@pytest.mark.parametrize("platform", [name for name in PLATFORMS if name.startswith("ept")])
def test_ept_access_test_paddr_without_ad_a_walk_is_a_read(platform, perm):
    """It is a write when the CPU must set A or D in L2's own entry."""
    test = UnitTest(platform, ad=False)
    test.clear(PTE_PAGE, perm=PERMISSIONS[perm])
    allows = PERMISSIONS[perm]
    for sets_bits, needs in ((spte.READ, READ), (spte.WRITE, WRITE)):
        for kind in (spte.READ, spte.WRITE, spte.EXEC):
            assert test.l2((PTE_PAGE, sets_bits), (DATA_PAGE1, kind)) == ("vmcall" if allows & needs else "ept_violation")
    assert (test.used(PTE_PAGE), test.used(DATA_PAGE1)) == (UNUSED, UNUSED)
