"""Bitmaps of GET and CLEAR as user memory: an ioctl sees an address, so what counts are bytes that can be read or written there."""

import array
import ctypes

import numpy as np
import pytest

import spte
from spte.errors import BufferFaultError

PAGES = 130  # three words, the last one in part
BYTES = 24
DIRTY = [0, 1, 63, 64, 129]


def logging_vm(manual=0, platform="npt"):
    vm = spte.VM(platform, manual=manual)
    memory = spte.Backing("4k", PAGES * 4096)
    vm.set_memory_region(0, 0, PAGES * 4096, memory)
    vm.vcpus[0].write(np.arange(PAGES))
    vm.set_memory_region(0, 0, PAGES * 4096, memory, flags=spte.LOG_DIRTY_PAGES)
    if manual == 3:
        vm.clear_dirty_log(0, 0, PAGES, b"\xff" * BYTES)
    vm.vcpus[0].write(DIRTY)
    return vm


def bitmap(pages, size=BYTES):
    bits = np.zeros(size * 8, np.uint8)
    bits[pages] = 1
    return np.packbits(bits, bitorder="little").tobytes()


BUFFERS = {
    "uint64": lambda n: np.zeros(-(-n // 8), np.uint64), "uint8": lambda n: np.zeros(n, np.uint8), "bool": lambda n: np.zeros(n, np.bool_),
    "float64": lambda n: np.zeros(-(-n // 8)), "big-endian": lambda n: np.zeros(-(-n // 8), ">u8"),
    "two dimensions": lambda n: np.zeros((-(-n // 8), 8), np.uint8), "zero dimensions": lambda n: np.zeros((), f"V{n}"),
    "records": lambda n: np.zeros(-(-n // 16), [("OLD", "u8"), ("O", "u8")]), "bytearray": bytearray,
    "memoryview": lambda n: memoryview(bytearray(n)), "part": lambda n: np.zeros(n + 3, np.uint8)[3:],
    "array": lambda n: array.array("b", bytes(n)), "ctypes": lambda n: (ctypes.c_ubyte * n)(),
}  # fmt: skip


@pytest.mark.parametrize("more", [0, 8, 40])
@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("manual", [0, 1, 3])
def test_any_buffer_of_enough_bytes_is_filled_from_its_front(manual, kind, more):
    out = BUFFERS[kind](BYTES + more)
    assert logging_vm(manual).get_dirty_log(0, out) is out
    got = bytes(memoryview(np.frombuffer(out, np.uint8)))
    assert got[:BYTES] == bitmap(DIRTY)
    assert not any(got[BYTES:])


def test_the_first_report():
    vm = spte.VM()
    vm.set_memory_region(0, 0, 4096, spte.Backing("4k", 4096), flags=spte.LOG_DIRTY_PAGES)
    vm.vcpus[0].write([0])
    assert vm.get_dirty_log(0, np.zeros(2, np.uint64)).tolist() == [1, 0]


TOO_SHORT = [bytearray(), bytearray(BYTES - 1), np.zeros(2, np.uint64), np.zeros(BYTES - 1, np.bool_)]
READ_ONLY = [bytes(BYTES), memoryview(bytes(64)), np.broadcast_to(np.uint8(0), (1,)).repeat(64)]
READ_ONLY[-1].flags.writeable = False


@pytest.mark.parametrize("manual", [0, 1])
@pytest.mark.parametrize("out", [*TOO_SHORT, *READ_ONLY], ids=lambda out: f"{type(out).__name__}-{memoryview(out).nbytes}")
def test_a_bad_pointer_costs_the_bits_only_where_kvm_has_taken_them(out, manual):
    vm = logging_vm(manual)
    with pytest.raises(BufferFaultError, match=r"EFAULT: out is (read-only|\d+ bytes long); pass 24 writable bytes, uint64\[3\]"):
        vm.get_dirty_log(0, out)
    assert vm.get_dirty_log(0).tobytes() == bitmap(DIRTY if manual else [])


NO_BUFFER = [5, "x", [0, 0, 0], (0,), object(), np.zeros(64, np.uint64)[::2], np.zeros((4, 4), np.uint64).T[:2], np.array([None] * 9)]


@pytest.mark.parametrize("given", NO_BUFFER, ids=lambda given: type(given).__name__)
def test_what_is_no_buffer_is_refused_before_anything_is_taken(given):
    vm = logging_vm()
    with pytest.raises(TypeError, match=r"out=.* is no C-contiguous buffer; pass an array of uint64"):
        vm.get_dirty_log(0, given)
    with pytest.raises(TypeError, match=r"bitmap=.* is no C-contiguous buffer; pass an array of uint64"):
        vm.clear_dirty_log(0, 0, PAGES, given)
    assert vm.get_dirty_log(0).tobytes() == bitmap(DIRTY)


@pytest.mark.parametrize("kind", [*BUFFERS, "bytes"])
@pytest.mark.parametrize("platform", ["ept-pml", "npt", "npt-rmap"])
def test_clear_reads_any_buffer_of_enough_bytes(kind, platform):
    vm = logging_vm(1, platform)
    given = bytearray(bitmap([1, 64, 2], BYTES + 16))
    if kind != "bytes":
        buffer = BUFFERS[kind](BYTES + 16)
        np.frombuffer(buffer, np.uint8)[: BYTES + 16] = np.frombuffer(given, np.uint8)
        given = buffer
    vm.clear_dirty_log(0, 0, PAGES, bytes(given) if kind == "bytes" else given)
    assert vm.get_dirty_log(0).tobytes() == bitmap([0, 63, 129])
    vm.vcpus[0].write([1])
    assert vm.get_dirty_log(0).tobytes() == bitmap([0, 1, 63, 129])


def test_clear_reads_as_many_bytes_as_the_range_has_words():
    vm = logging_vm(1)
    vm.clear_dirty_log(0, 64, 64, b"\x01" + bytes(7))
    vm.clear_dirty_log(0, 0, 0, b"")
    assert vm.get_dirty_log(0).tobytes() == bitmap([0, 1, 63, 129])
    vm.clear_dirty_log(0, 128, 2, b"\xff" * 8)  # bits behind the slot's end do not matter
    assert vm.get_dirty_log(0).tobytes() == bitmap([0, 1, 63])


@pytest.mark.parametrize("given", [b"", bytes(BYTES - 1), np.ones(2, np.uint64)], ids=len)
def test_a_clear_that_can_not_be_read_changes_nothing_but_the_kicks(given):
    vm = logging_vm(1, "ept-pml")
    before = vm.leafs(), vm.slots()
    with pytest.raises(BufferFaultError, match=r"EFAULT: bitmap is \d+ bytes long; pass 24 bytes, uint64\[3\]"):
        vm.clear_dirty_log(0, 0, PAGES, given)
    assert (vm.leafs(), vm.slots()) == before
