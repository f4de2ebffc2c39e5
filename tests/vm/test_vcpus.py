"""vCPUs as a VMM makes them: none at first, one by one, after logging began; rings enabled in between; system management mode."""

import numpy as np
import pytest
from conftest import LOG, PAGE, PLATFORMS, has_rings, pages_of

import spte
from spte import mm

NPAGES, BASE = 256, 0
SMRAM = 0x3F  # gfn of the page that KVM saves the state to, with SMBASE after a reset
SMM = 1 << 16
RING = 16384


def guest(platform="ept-pml", policy="6.12", flags=LOG, **given):
    """A VM with a slot of 256 pages in each address space, on the same memory, and its vCPUs."""
    vm, memory = spte.VM(platform, policy, **given), spte.Backing("4k", NPAGES * PAGE)
    for as_id in (0, SMM):
        vm.set_memory_region(as_id, BASE, NPAGES * PAGE, memory, flags=flags)
    return vm


def dirty(vm, slot=0):
    return pages_of(vm.get_dirty_log(slot))


def entries(vcpu):
    """(slot, page) of each entry that is dirty, from the ring's front."""
    ring = vcpu.ring
    return [(int(slot), int(page)) for flags, slot, page in ring.tolist() if flags == 1]


# -- vCPUs ----------------------------------------------------------------------------------------------------------------


def test_a_vm_without_vcpus_gets_them_one_by_one(platform):
    vm = guest(platform, vcpus=0)
    assert vm.vcpus == ()
    assert [vm.create_vcpu(given).vcpu_id for given in (None, 7, None, 2, None)] == [0, 7, 1, 2, 3]
    assert [vcpu.index for vcpu in vm.vcpus] == [0, 1, 2, 3, 4]
    vm.vcpus[4].write([1, 3])
    assert dirty(vm) == {1, 3}
    vm.check()


@pytest.mark.parametrize("policy", ["5.10", "6.12"])
def test_create_vcpu_refuses_in_kvms_order(policy):
    vm = spte.VM("npt", policy)
    limit, ids = vm.check_extension("max_vcpus"), vm.check_extension("max_vcpu_id")
    with pytest.raises(spte.KvmError, match="EEXIST: vcpu_id=0 is another vCPU's; leave it out"):
        vm.create_vcpu(0)
    for wrong in (-1, ids):
        with pytest.raises(spte.KvmError, match=f"EINVAL: vcpu_id={wrong} is not in 0..{ids - 1}"):
            vm.create_vcpu(wrong)
    full = spte.VM("npt", policy, vcpus=limit)
    for given in (None, 0, ids - 1):  # the number is checked before the id
        with pytest.raises(spte.KvmError, match=f"EINVAL: the VM has {limit} vCPUs, as many as policy {policy} allows"):
            full.create_vcpu(given)
    assert len(full.vcpus) == limit
    vm.close()
    with pytest.raises(spte.KvmError, match="EBADF"):
        vm.create_vcpu()


def test_calls_that_name_a_vcpu_say_that_there_is_none():
    vm = guest(vcpus=0)
    for call in (lambda: vm.kernel_write(1), vm.leafs):
        with pytest.raises(spte.KvmError, match=r"EINVAL: vcpu=0: the VM has none; call create_vcpu\(\) first"):
            call()
    assert dirty(vm) == set()


@pytest.mark.parametrize("policy", ["5.10", "6.12", "7.2"])
def test_a_vcpu_made_while_a_slot_logs_begins_with_pml_on(policy):
    vm = guest("ept-pml", policy, flags=0, vcpus=1)
    vm.vcpus[0].write(np.arange(64))
    vm.set_memory_region(0, BASE, NPAGES * PAGE, flags=LOG)
    late = vm.create_vcpu()
    assert late.arrays.vcpu[0].pml_enabled == 0  # until it enters
    late.write(np.arange(10))
    assert late.arrays.vcpu[0].pml_enabled == 1
    assert vm.stats()["vcpu1"]["pf_fast"] == 0  # no fault: D alone was clear
    assert dirty(vm) == set(range(10))
    vm.check()


def test_a_vcpu_made_between_two_periods_of_logging_follows_the_second():
    vm = guest("ept-pml", vcpus=0)
    late = vm.create_vcpu()
    late.write([1])
    for as_id in (0, SMM):
        vm.set_memory_region(as_id, BASE, NPAGES * PAGE, flags=0)
    idle = vm.create_vcpu()
    idle.write([2])
    assert idle.arrays.vcpu[0].pml_enabled == 0
    vm.set_memory_region(0, BASE, NPAGES * PAGE, flags=LOG)
    idle.write([3])
    assert idle.arrays.vcpu[0].pml_enabled == 1
    assert dirty(vm) == {3}


def test_tracepoints_cover_a_vcpu_made_later():
    vm = guest(vcpus=0)
    vm.trace_events(True)
    vm.create_vcpu().write([5])
    assert ["mark_page_dirty_in_slot", 5] in vm.drain_events()


# -- rings enabled by capability --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", ["dirty_log_ring", 223])
def test_a_ring_is_enabled_before_the_first_vcpu(platform, cap):
    vm = guest(platform, vcpus=0)
    vm.enable_cap(cap, RING)
    vcpus = [vm.create_vcpu() for _ in range(2)]
    assert [len(vcpu.ring) for vcpu in vcpus] == [RING // 16] * 2
    vcpus[1].write([4])
    assert [entries(vcpu) for vcpu in vcpus] == [[], [(0, 4)]]
    with pytest.raises(spte.KvmError, match="ENXIO"):
        vm.get_dirty_log(0)
    vm.check()
    assert all(slot["kbitmap"] is None for slot in vm.slots())


def test_a_ring_is_refused_in_kvms_order():
    vm = guest(vcpus=0)
    for size, text in ((0, "not a power of two"), (8192, "too small"), (1 << 21, "too large")):
        with pytest.raises(spte.KvmError, match=text) as caught:
            vm.enable_cap(192, size)
        assert caught.value.errno_name == ("E2BIG" if size == 1 << 21 else "EINVAL")
    vm.enable_cap(192, RING)
    vm.create_vcpu()
    with pytest.raises(spte.KvmError, match="EINVAL: the VM has rings of 16384 bytes already; a size is given once"):
        vm.enable_cap(192, 2 * RING)
    late = guest(vcpus=1)
    with pytest.raises(spte.KvmError, match="EINVAL: ring of 16384 bytes comes too late: vCPUs exist; make the VM with vcpus=0"):
        late.enable_cap(192, RING)
    late.vcpus[0].write([3])
    assert dirty(late) == {3}


# -- writes by KVM itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "warns", "marks"), [("5.10", False, True), ("6.1", True, False), ("6.12", True, True)])
def test_a_kernel_write_without_a_vcpu_in_a_bitmap_vm(policy, warns, marks):
    vm = guest("npt", policy)
    if warns:
        with pytest.warns(spte.KernelWarning, match="KVM wrote guest memory while no vCPU ran"):
            vm.kernel_write(3, vcpu=None)
    else:
        vm.kernel_write(3, vcpu=None)
    vm.kernel_write(4, vcpu=None)  # a second warning would be an error
    assert dirty(vm) == ({3, 4} if marks else set())
    assert dirty(vm, SMM) == set()
    vm.check()


@pytest.mark.parametrize("policy", ["5.15", "6.1", "6.12", "7.2"])
def test_a_kernel_write_without_a_vcpu_is_lost_in_a_ring_vm(policy):
    vm = guest("npt", policy, ring_bytes=4096)
    assert vm.check_extension(225) == 0  # KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
    with pytest.warns(spte.KernelWarning, match="no vCPU ran: gfn 0x3 is in no dirty log"):
        vm.kernel_write(3, vcpu=None)
    vm.kernel_write(3, vcpu=None)
    assert entries(vm.vcpus[0]) == []
    vm.kernel_write(3)
    assert entries(vm.vcpus[0]) == [(0, 3)]


def test_kernel_writes_overrun_a_ring_and_warn_once():
    vm = guest("npt", ring_bytes=4096)
    for n in range(256):
        vm.kernel_write(n % 8)
    ring = vm.vcpus[0].ring
    assert (ring["flags"] == 1).all()
    assert vm.vcpus[0].write([100]).reason == "dirty_ring_full"
    with pytest.warns(spte.KernelWarning, match="a full dirty ring is overrun: KVM's write of gfn 0x64 has taken the place"):
        vm.kernel_write(100)
    vm.kernel_write(101)
    assert ring["offset"][:3].tolist() == [100, 101, 2]
    other = guest("npt", ring_bytes=4096)
    for n in range(256):
        other.kernel_write(n % 8)
    with pytest.warns(spte.KernelWarning) as told:  # each VM once
        other.kernel_write(0)
    assert told[0].filename == __file__  # where the user called


def test_a_write_that_is_not_logged_overruns_nothing():
    vm = guest("npt", ring_bytes=4096)
    for n in range(256):
        vm.kernel_write(n % 8)
    vm.set_memory_region(0, BASE, NPAGES * PAGE, flags=0)
    vm.kernel_write(3)
    assert vm.vcpus[0].ring["offset"][0] == 0


# -- system management mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["5.10", "6.1", "6.12", "7.2"])
def test_smm_writes_are_in_the_log_of_address_space_1(platform, policy):
    vm = guest(platform, policy)
    vcpu = vm.vcpus[0]
    vcpu.write([1, 2])
    vcpu.enter_smm()
    assert vcpu.in_smm
    vcpu.write([2, 3])
    vm.check()
    assert dirty(vm) == {1, 2}
    assert dirty(vm, SMM) == {SMRAM, 2, 3}
    vcpu.write([3])  # armed again
    vcpu.leave_smm()
    assert not vcpu.in_smm
    vcpu.write([2, 9])
    assert dirty(vm) == {2, 9}
    assert dirty(vm, SMM) == {3}
    vm.check()
    assert vm.close() == 2


@pytest.mark.parametrize("mode", [1, 3])
def test_clear_arms_each_address_space_by_itself(platform, mode):
    vm = guest(platform, manual=mode, flags=0)
    vcpu = vm.vcpus[0]
    vcpu.write([1, 2])
    vcpu.enter_smm()
    vcpu.write([1, 2])
    for as_id in (0, SMM):
        vm.set_memory_region(as_id, BASE, NPAGES * PAGE, flags=LOG)
        vm.clear_dirty_log(as_id, 0, NPAGES, np.full(4, ~np.uint64(0)))
    vcpu.write([2])
    assert [dirty(vm, as_id) for as_id in (0, SMM)] == [set(), {2}]
    vcpu.leave_smm()
    vcpu.write([1])
    assert [dirty(vm, as_id) for as_id in (0, SMM)] == [{1}, {2}]
    vm.check()


@pytest.mark.parametrize("policy", ["6.1", "6.12", "7.2"])
def test_a_ring_holds_entries_of_both_address_spaces_and_reset_arms_both(platform, policy):
    vm = guest(platform, policy, ring_bytes=RING)
    vcpu = vm.vcpus[0]
    vcpu.write([1])
    vcpu.enter_smm()
    vcpu.write([1, 5])
    vcpu.leave_smm()
    found = entries(vcpu)
    assert sorted(found) == [(0, 1), (SMM, 1), (SMM, 5), (SMM, SMRAM)]
    vcpu.ring["flags"][: len(found)] |= 2
    assert vm.reset_dirty_rings() == 4
    vcpu.enter_smm()
    vcpu.write([5])
    vcpu.leave_smm()
    vcpu.write([1])
    assert sorted(entries(vcpu)) == [(0, 1), (SMM, 5), (SMM, SMRAM)]
    vm.check()


@pytest.mark.parametrize(("policy", "kept"), [("5.10", False), ("6.1", False), ("6.12", True)])
def test_the_tdp_mmus_root_of_the_space_left_is_kept_or_zapped(policy, kept):
    vm = guest("npt", policy, flags=0)
    vm.vcpus[0].write([1, 2, 3])
    before = vm.leafs()
    vm.vcpus[0].enter_smm()
    assert vm.leafs() == []
    vm.vcpus[0].leave_smm()
    assert vm.leafs() == (before if kept else [])
    two = guest("npt", policy, flags=0, vcpus=2)
    two.vcpus[0].write([1, 2, 3])
    two.vcpus[1].read([1])
    two.vcpus[0].enter_smm()
    two.vcpus[0].leave_smm()
    assert two.leafs() == before  # the other vCPU held it


def test_the_roots_have_the_address_space_in_their_role():
    vm = guest("npt", flags=0)
    vm.vcpus[0].read([1])
    assert {row[3] for row in vm.tables()} == {"3784", "3783", "3782", "3781"}
    vm.vcpus[0].enter_smm()
    vm.vcpus[0].read([1])
    assert {row[3] for row in vm.tables()} == {"1003784", "1003783", "1003782", "1003781"}


def test_a_host_page_that_goes_is_dropped_from_both_address_spaces(platform):
    vm = guest(platform, flags=0)
    memory = vm.memslots.find(0).backings[0]
    vm.vcpus[0].write([1, 2])
    vm.vcpus[0].enter_smm()
    vm.vcpus[0].write([1, 2])
    assert vm.stats()["vm"]["pages_4k"] == 4
    mm.madvise(memory, 1, 1)
    assert vm.stats()["vm"]["pages_4k"] == 2
    vm.check()
    vm.set_memory_region(SMM, 0, 0)
    assert vm.vcpus[0].write([1]).reason == "mmio"
    vm.vcpus[0].leave_smm()
    assert vm.vcpus[0].write([1]) is None
    vm.check()


def test_smm_is_refused_where_it_can_not_be():
    vm = spte.VM("npt")
    vcpu = vm.vcpus[0]
    with pytest.raises(spte.KvmError, match="EINVAL: no writable slot of address space 1 has gpa 0x3f000, where KVM saves the state"):
        vcpu.enter_smm()
    assert not vcpu.in_smm
    with pytest.raises(spte.KvmError, match=r"EINVAL: the vCPU is not in system management mode; call enter_smm\(\) first"):
        vcpu.leave_smm()
    vm = guest("npt")
    vcpu = vm.vcpus[0]
    with pytest.raises(spte.KvmError, match="smbase=0x30001 is not a multiple of 4096; round down to 0x30000"):
        vcpu.enter_smm(0x30001)
    vcpu.enter_l2()
    with pytest.raises(spte.KvmError, match=r"the vCPU runs L2, and KVM takes an SMI in L1; call leave_l2\(\) first"):
        vcpu.enter_smm()
    vcpu.leave_l2()
    vcpu.enter_smm(0x40000)
    assert dirty(vm, SMM) == {0x4F}
    with pytest.raises(spte.KvmError, match="in system management mode already"):
        vcpu.enter_smm()
    for call in (lambda: vcpu.load_cr3(0), vcpu.enter_l2):
        with pytest.raises(spte.KvmError, match="in system management mode the guest has its paging off"):
            call()


def test_the_guests_own_paging_comes_back_under_shadow_paging():
    vm = guest("shadow")
    memory = spte.Backing("4k", 16 * PAGE)
    vm.set_memory_region(5, 1 << 20, 16 * PAGE, memory)
    tables = spte.GuestTables(memory, 1 << 20)
    tables.map(10, 20, count=4)
    vcpu = vm.vcpus[0]
    vcpu.load_cr3(tables.address())
    vcpu.write([10])
    vcpu.enter_smm()
    vcpu.write([10])  # paging is off: gfn 10 is page 10
    vm.check()
    vcpu.leave_smm()
    vcpu.write([11])
    assert dirty(vm) == {20, 21}
    assert dirty(vm, SMM) == {10, SMRAM}
    vm.check()


@pytest.mark.parametrize("name", [name for name in PLATFORMS if "rmap" not in name])
def test_vcpus_in_and_out_of_smm_share_nothing_but_the_memory(name):
    vm = guest(name, vcpus=2, ring_bytes=RING if has_rings("6.12") else 0)
    vm.vcpus[0].enter_smm()
    vm.vcpus[1].write([6])
    vm.vcpus[0].write([6])
    assert entries(vm.vcpus[1]) == [(0, 6)]
    assert sorted(entries(vm.vcpus[0])) == [(SMM, 6), (SMM, SMRAM)]
    vm.check()


def test_a_page_of_smm_leaves_an_unsync_page_of_the_same_gfn_alone():
    """Under shadow paging SMM has a level-2 page of gfn 0x40000, where the guest has a table of its own: other slots hold its rmaps."""
    vm, tables_at = guest("shadow", vcpus=2), 0x40000 - 3
    memory = spte.Backing("4k", 16 * PAGE)
    vm.set_memory_region(5, tables_at * PAGE, 16 * PAGE, memory)
    tables = spte.GuestTables(memory, tables_at * PAGE)
    tables.map(10, 20, count=4)
    tables.map(0x40000, 0x40000)
    address, entry, _ = tables.entry(10)
    assert address >> 12 == 0x40000
    vcpu, other = vm.vcpus
    vcpu.load_cr3(tables.address())
    vcpu.write([10])
    vcpu.store(address, entry)  # the table of level 1 is unsync from now on
    assert int(vm.mmu.tables.kvm[0].mmu_unsync) == 1
    other.enter_smm()
    other.write([20])
    assert int(vm.mmu.tables.kvm[0].mmu_unsync) == 1
    vm.check()
    vcpu.write([10])
    assert dirty(vm) == {20}
    assert dirty(vm, SMM) == {20, SMRAM}
    vm.set_memory_region(0, BASE, NPAGES * PAGE, flags=0)
    vm.check()


# -- found beside the host's KVM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 40, 1 << 52, (1 << 64) - (8 << 20)])
def test_prefault_looks_at_no_limit_but_64_bits(platform, size):
    """KVM refuses a range that wraps, none that is large: it maps up to the first hole, and says what is left."""
    vm = guest(platform)
    vcpu = vm.vcpus[0]
    if platform == "shadow":
        with pytest.raises(spte.KvmError, match="EOPNOTSUPP"):
            vcpu.prefault(0, size)
        return
    end = NPAGES * PAGE
    assert vcpu.prefault(end - 2 * PAGE, size) == (end, size - 2 * PAGE)
    for hole in (end, 1 << 52, (1 << 64) - 8192):
        with pytest.raises(spte.KvmError, match="ENOENT"):
            vcpu.prefault(hole, PAGE)
    with pytest.raises(spte.KvmError, match="EINVAL"):
        vcpu.prefault(PAGE, (1 << 64) - PAGE)
    vm.check()


# -- threads ----------------------------------------------------------------------------------------------------------------


def test_a_vcpu_goes_in_and_out_of_smm_while_others_run_and_are_harvested(platform, pool):
    vm = guest(platform, vcpus=3)
    rounds, found = 30, {0: set(), SMM: set()}

    def in_smm():
        for n in range(rounds):
            vm.vcpus[0].enter_smm()
            vm.vcpus[0].write([n, 100 + n])
            vm.vcpus[0].leave_smm()

    def outside(v):
        for n in range(rounds):
            vm.vcpus[v].write(np.arange(128) + 64 * v)
            if n == rounds // 2:
                vm.create_vcpu().write([250 + v])

    def harvest():
        for as_id in found:
            found[as_id] |= dirty(vm, as_id)

    running = [pool.submit(in_smm), pool.submit(outside, 1), pool.submit(outside, 2)]
    while not all(each.done() for each in running):
        harvest()
    for each in running:
        each.result()
    harvest()
    assert found == {0: {*range(64, 256), 251, 252}, SMM: {SMRAM, *range(rounds), *range(100, 100 + rounds)}}
    assert len(vm.vcpus) == 5
    vm.check()
