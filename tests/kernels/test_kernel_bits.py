"""SPTEs and roles in the bits of each kernel: values as the recordings show them, and there and back again."""

import numpy as np
import pytest
from conftest import LOG, PAGE, PLATFORMS, Guest
from hypothesis import given
from hypothesis import strategies as st

import spte
from spte.bits import MMU_PRESENT, layout
from spte.kernel_bits import kernel_bits
from spte.platform import named
from spte.policy import Policy

VERSIONS = ("5.10", "6.1", "6.12", "7.2")


def bits_of(platform, version):
    return kernel_bits(named(platform), Policy.named(version))


# A writable 4 KiB leaf with A and D, one that is write-protected, one that the host does not let write: in each version.
LEAVES = {
    ("npt", "5.10"): ("c67", "c65", "25"),
    ("npt", "6.1"): ("e67", "e65", "825"),
    ("npt", "6.12"): ("e67", "e65", "825"),
    ("npt", "7.2"): ("e67", "e65", "825"),
    ("ept-pml", "5.10"): ("f77", "d75", "175"),
    ("ept-pml", "6.12"): ("8600000000000b77", "8600000000000975", "8000000000000975"),
    ("ept-pml", "7.2"): ("80a0000000000f77", "80a0000000000d75", "8000000000000d75"),
    ("ept-noad", "5.10"): ("10000000000c77", "10000000000c75", "10000000000075"),
    ("ept-noad", "6.12"): ("8610000000000877", "8610000000000875", "8010000000000875"),
    ("ept-noad", "7.2"): ("90a0000000000f77", "90a0000000000f75", "9000000000000d75"),
}


@pytest.mark.parametrize(("platform", "version"), LEAVES)
def test_leaves_have_the_bits_of_the_version(platform, version):
    written, protected, read_only = LEAVES[platform, version]
    guest = Guest(platform, version, npages=4, populate=False)
    guest.read([0])
    guest.write([1])
    assert guest.leafs() == {(1, guest.base): int(read_only, 16), (1, guest.base + 1): int(written, 16)}
    guest.set_flags(LOG)
    found = guest.leafs()[1, guest.base + 1]
    guest.vm.check()
    if platform != "ept-pml":
        assert f"{found:x}" == protected
    else:
        assert found & ~(1 << 9) == int(protected, 16) | 2  # D is taken, not W


ROLES = {
    ("npt", "5.10"): ("2794", "2794", "2793", "2792"),
    ("npt", "6.12"): ("3784", "3783", "3782", "3781"),
    ("npt", "7.2"): ("6f84", "6f83", "6f82", "6f81"),
    ("ept-pml", "7.2"): ("106f84", "106f83", "106f82", "106f81"),
    ("ept-noad", "7.2"): ("116f84", "116f83", "116f82", "116f81"),
    ("npt-rmap", "5.10"): ("2794", "2793", "2792", "2791"),
    ("shadow", "5.10"): ("2792", "2791"),
    ("shadow", "7.2"): ("2f82", "2f81"),
}


@pytest.mark.parametrize(("platform", "version"), ROLES)
def test_pages_have_the_role_of_the_version(platform, version):
    guest = Guest(platform, version, npages=4)
    guest.write([0])
    assert tuple(dict.fromkeys(row[3] for row in guest.vm.tables())) == tuple(dict.fromkeys(ROLES[platform, version]))


def test_a_zapped_root_says_so_in_the_bit_of_the_version():
    for version, role in (("6.12", "3f84"), ("7.2", "7f84"), ("5.10", "2794")):  # 5.10 empties its root, which stays valid
        guest = Guest("npt", version, npages=4)
        guest.write([0])
        guest.vm.set_memory_region(0, 0, 0)
        assert [row[3] for row in guest.vm.tables()] == [role]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_mmio_spte_of_any_generation_goes_there_and_back(version):
    bits, lay = bits_of("npt", version), layout(named("npt"), Policy.named(version).spte_layout)
    for generation in (0, 2, 255, 256, 511, 512, (1 << 18) - 2):
        value = int(lay.mmio) | 0x3FF << 12 | (generation & 0xFF) << 3 | (generation >> 8) << 52
        assert bits.arena(bits.spte(value)) == value
    assert f"{bits_of('npt', '5.10').spte(int(lay.mmio) | 0x3FF << 12 | 4 << 3):x}" == "380000003ff027"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("platform", PLATFORMS)
@given(data=st.data())
def test_every_entry_goes_there_and_back(platform, version, data):
    """Of what the arena may hold: any of the bits that the layout has, a frame, present or empty."""
    bits, lay = bits_of(platform, version), layout(named(platform), Policy.named(version).spte_layout)
    used = int(lay.present | lay.user | lay.x | lay.accessed | lay.dirty | lay.host_writable | lay.mmu_writable | lay.memtype) | 2 | 1 << 7
    parked = int(lay.type_root) and 5 << 54
    flags = data.draw(st.integers(0, (1 << 64) - 1)) & (used | parked)
    frame = data.draw(st.integers(0, (1 << 40) - 1)) << 12
    present = int(MMU_PRESENT | lay.present | lay.type_root | lay.memtype)  # no leaf of EPT is without its memory type
    values = [present | flags | frame, int(lay.nonpresent), int(lay.frozen)]
    assert [bits.arena(bits.spte(value)) for value in values] == values
    array = np.array([values, values[::-1]], np.uint64)
    there = bits.to_kernel(array)
    assert there.tolist() == [[bits.spte(v) for v in row] for row in array.tolist()]
    assert (bits.to_arena(there) == array).all()


def test_the_fuller_memory_of_old_kernels_lies_where_it_may():
    """5.10 takes a memslot anywhere; 5.18 and later below the guest's width."""
    for version, taken in (("5.10", True), ("5.17", True), ("5.18", False), ("6.12", False)):
        vm = spte.VM("npt", version)
        try:
            vm.set_memory_region(0, 1 << 51, PAGE, spte.Backing("4k", PAGE), flags=LOG)
        except spte.KvmError:
            assert not taken
        else:
            assert taken
            assert vm.get_dirty_log(0).tolist() == [0]
            vm.check()
