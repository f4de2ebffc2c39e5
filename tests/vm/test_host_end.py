"""Host memory ends where its mapping ends: whatever reaches beyond finds nothing there, page by page."""

import gc

import numpy as np
import pytest

import spte
from spte import mm
from spte.errors import HostRangeError, PrefaultHostError
from spte.host.backing import KINDS
from spte.host.pages import the_host

PLATFORMS = ("ept-pml", "ept-noad", "npt", "ept-pml-rmap", "npt-rmap", "shadow")
UNIT = {"2m": 512, "1g": 512 * 512}


def sizes(kind):
    """Sizes of memory in pages that end inside a 2 MiB block, at its end, and one page behind it, as far as the kind has them."""
    unit = UNIT.get(kind[-2:], 1)
    return [unit * n for n in ((1,) if unit > 512 else (1, 2) if unit > 1 else (1, 511, 512, 513, 1025))]


CASES = [(kind, pages) for kind in KINDS for pages in sizes(kind)]


def beyond(kind, pages, platform="ept-pml", policy="6.12", extra=2, **backing):
    """A VM whose slot is `extra` pages larger than its memory of `pages` pages."""
    memory = spte.Backing(kind, pages * 4096, **backing)
    vm = spte.VM(platform, policy)
    vm.set_memory_region(0, 0, (pages + extra) * 4096, memory)
    return vm, memory


def efault(stop, gfn):
    return (stop.reason, stop.gfn) == ("efault", gfn)


@pytest.mark.parametrize("populate", [False, True])
@pytest.mark.parametrize("access", ["read", "write", "exec"])
@pytest.mark.parametrize(("kind", "pages"), CASES)
def test_every_access_beyond_the_memory_is_refused_and_none_inside(kind, pages, access, populate):
    vm, _ = beyond(kind, pages, populate=populate)
    inside = [0, pages - 1, pages // 2]
    assert efault(getattr(vm.vcpus[0], access)([*inside, pages]), pages)
    assert efault(getattr(vm.vcpus[0], access)([pages + 1]), pages + 1)
    assert getattr(vm.vcpus[0], access)(inside) is None
    vm.check()


@pytest.mark.parametrize("policy", ["5.10", "6.1", "6.12", "7.2"])
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", ["4k", "thp", "shm"])
def test_so_it_is_on_every_platform_page_by_page_and_in_one_batch(platform, kind, policy):
    for pages in (1, 513):
        vm, _ = beyond(kind, pages, platform, policy, extra=511)
        stop = vm.vcpus[0].write(np.arange(pages + 511))
        assert (stop.reason, stop.index, stop.gfn) == ("efault", pages, pages)
        assert all(efault(vm.vcpus[0].read([gfn]), gfn) for gfn in range(pages, pages + 511, 17))
        assert not any(efault(vm.vcpus[0].read([gfn]) or spte.Exit("none", 0, -1, spte.READ), gfn) for gfn in range(pages))
        mapped = {first + n for level, first, count, _ in vm.leafs() for n in range(count << 9 * (level - 1))}
        assert mapped == set(range(pages))
        vm.check()


def test_the_first_report():
    vm = spte.VM()
    vm.set_memory_region(0, 0, 8192, spte.Backing("4k", 4096))
    assert efault(vm.vcpus[0].write([1]), 1)
    assert vm.vcpus[0].write([0]) is None


@pytest.mark.parametrize("kind", ["4k", "thp", "shm"])
def test_memory_that_begins_inside_a_block_begins_there(kind):
    """A slot by host address may begin before the memory."""
    memory = spte.Backing(kind, 600 * 4096, hva_offset=100 * 4096)
    vm = spte.VM()
    vm.set_memory_region(0, 0, 800 * 4096, hva=memory.hva - 100 * 4096)
    outside = [gfn for gfn in range(800) if (vm.vcpus[0].write([gfn]) or spte.Exit("none", 0, -1, spte.READ)).reason == "efault"]
    assert outside == [*range(100), *range(700, 800)]
    offset = spte.VM()
    offset.set_memory_region(0, 0, 8192, memory, offset=599 * 4096)
    assert offset.vcpus[0].write([0]) is None
    assert efault(offset.vcpus[0].write([1]), 1)


@pytest.mark.parametrize("platform", ["ept-pml", "npt-rmap"])
def test_prefault_ends_there(platform):
    vm, _ = beyond("thp", 3, platform, "6.12")
    assert vm.vcpus[0].prefault(0, 5 * 4096) == (3 * 4096, 2 * 4096)
    with pytest.raises(PrefaultHostError, match="EFAULT: the host has no memory for gpa 0x3000"):
        vm.vcpus[0].prefault(3 * 4096, 4096)


def test_kvm_writes_nothing_there():
    vm, memory = beyond("thp", 1)
    vm.set_memory_region(0, 0, 3 * 4096, memory, flags=spte.LOG_DIRTY_PAGES)
    vm.kernel_write(1)
    assert vm.get_dirty_log(0).tolist() == [0]
    vm.kernel_write(0)
    assert vm.get_dirty_log(0).tolist() == [1]


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("kind", ["4k", "thp", "shm"])
def test_what_userspace_does_to_the_memory_leaves_its_end_where_it_is(kind, logs):
    vm, memory = beyond(kind, 513)
    vm.set_memory_region(0, 0, 515 * 4096, memory, flags=int(logs))
    for change in (
        lambda: mm.madvise(memory, 0, 513), lambda: mm.madvise(memory, 512, 1), lambda: mm.mprotect(memory, 0, 513, mm.PROT_READ),
        lambda: mm.mprotect(memory, 0, 513), lambda: mm.fork([memory]), lambda: mm.clear_refs([memory]), lambda: memory.write(0, 513),
    ):  # fmt: skip
        change()
        assert efault(vm.vcpus[0].read([*range(513), 513]), 513)
        assert efault(vm.vcpus[0].write([514]), 514)
        vm.check()
    assert vm.vcpus[0].write(np.arange(513)) is None


def test_a_block_that_is_partly_there_is_never_huge():
    vm, memory = beyond("thp", 1023, extra=1)
    assert efault(vm.vcpus[0].write(np.arange(1024)), 1023)
    assert [level for level, *_ in vm.leafs()] == [2, 1]
    assert memory.huge_bytes == 2 << 20
    for flags in (1, 0):  # logging splits the huge page, and only that comes back
        vm.set_memory_region(0, 0, 1024 * 4096, memory, flags=flags)
        vm.vcpus[0].write(np.arange(1023))
    assert [(level, first) for level, first, *_ in vm.leafs()] == [(2, 0), (1, 512)]


@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 1), (-1, 1), (0, -1), (0, 1 << 70)])
def test_userspace_can_not_write_beyond_either(first, count):
    memory = spte.Backing("4k", 4096)
    before = the_host().blocks[memory.hpage >> 9].copy()
    with pytest.raises(HostRangeError, match="EINVAL: "):
        memory.write(first, count)
    assert the_host().blocks[memory.hpage >> 9] == before


# -- memslots by host address alone


@pytest.mark.parametrize("platform", ["ept-pml", "npt-rmap", "shadow"])
def test_a_slot_by_host_address_hears_what_becomes_of_its_pages(platform):
    memory = spte.Backing("4k", 8 * 4096)
    vm = spte.VM(platform)
    vm.set_memory_region(0, 0, 8 * 4096, hva=memory.hva)
    assert vm.vcpus[0].read(np.arange(8)) is None
    assert vm.vcpus[0].write(np.arange(8)) is None  # each zero page is copied, and the guest hears of it
    mm.madvise(memory, 2, 3)
    assert [(first, count) for _, first, count, _ in vm.leafs()] == [(0, 2), (5, 3)]
    vm.check()


def test_a_slot_that_reaches_into_the_next_memory_hears_of_that_too():
    below, above = sorted((spte.Backing("4k", 8192) for _ in range(2)), key=lambda memory: memory.hva)
    end = (above.hva - below.hva) >> 12
    vm = spte.VM()
    vm.set_memory_region(0, 0, (end + 2) << 12, below)
    assert vm.vcpus[0].read([end, end + 1]) is None
    assert vm.vcpus[0].write([end]) is None
    mm.madvise(above, 0, 1)
    assert [(first, count) for _, first, count, _ in vm.leafs()] == [(end + 1, 1)]


def test_memory_stays_as_long_as_a_slot_names_its_address():
    memory = spte.Backing("4k", 4096, populate=True)
    hva = memory.hva
    vm = spte.VM()
    vm.set_memory_region(0, 0, 4096, hva=hva)
    del memory
    gc.collect()
    assert all(spte.Backing("4k", 4096).hva != hva for _ in range(3))
    assert vm.vcpus[0].write([0]) is None
