"""What KVM_CHECK_EXTENSION says and the limits behind it, version by version."""

import pytest

import spte
from spte.errors import CapabilityError, RingTooLargeError, SlotIdError
from spte.policy import VERSIONS

NR_MEMSLOTS, MAX_VCPUS, ADDRESS_SPACES, MAX_VCPU_ID, MANUAL, RING, ACQ_REL, PREFAULT = 10, 66, 118, 128, 168, 192, 223, 236
CHANGES = {  # capability: its value on 5.10, then from the version of each commit on
    NR_MEMSLOTS: {"5.10": 509, "5.12": 32764},  # 4fc096a99e01
    MAX_VCPUS: {"5.10": 288, "5.15": 1024},  # 074c82c8f7cf
    ADDRESS_SPACES: {"5.10": 2},
    MAX_VCPU_ID: {"5.10": 1023, "5.15": 4096},  # 4ddacd525a2f
    MANUAL: {"5.10": 3},
    RING: {"5.10": 0, "5.11": 1 << 20},  # fb04a1eddb1a
    ACQ_REL: {"5.10": 0, "6.1": 1 << 20},  # 17601bfed909
    225: {"5.10": 0},  # rings with a bitmap: never on x86
    PREFAULT: {"5.10": 0, "6.11": 1},
}


def expected(cap, version):
    return [value for since, value in CHANGES[cap].items() if VERSIONS.index(since) <= VERSIONS.index(version)][-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_capability_is_that_of_the_version(version):
    vm = spte.VM("npt", version)
    assert {cap: vm.check_extension(cap) for cap in CHANGES} == {cap: expected(cap, version) for cap in CHANGES}


def test_capabilities_have_names_too_and_what_is_not_known_is_0():
    vm = spte.VM("shadow", "6.12")
    names = ("nr_memslots", "KVM_CAP_MAX_VCPUS", "max_vcpu_id", "dirty_log_ring_acq_rel", "pre_fault_memory", "no_such_thing")
    assert [vm.check_extension(name) for name in names] == [32764, 1024, 4096, 1 << 20, 0, 0]
    assert [vm.check_extension(cap) for cap in (0, 1, -1, 1 << 70)] == [0, 0, 0, 0]


@pytest.mark.parametrize("version", VERSIONS)
def test_limits_are_what_the_capabilities_say(version):
    most = spte.VM("npt", version).check_extension(MAX_VCPUS)
    with pytest.raises(CapabilityError, match=rf"EINVAL: vcpus={most + 1} is not in 0\.\.{most}"):
        spte.VM("npt", version, vcpus=most + 1)
    vm = spte.VM("npt", version, vcpus=most)
    assert len(vm.vcpus) == most
    slots, memory = vm.check_extension(NR_MEMSLOTS), spte.Backing("4k", 4096)
    vm.set_memory_region(1 << 16 | slots - 1, 0, 4096, memory)
    for call in (
        lambda: vm.set_memory_region(slots, 0, 4096, memory), lambda: vm.get_dirty_log(slots),
        lambda: vm.clear_dirty_log(slots, 0, 0, b""), lambda: vm.set_memory_region(2 << 16, 0, 4096, memory),
    ):  # fmt: skip
        with pytest.raises(SlotIdError):
            call()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_ring_is_there_from_5_11_on(version):
    if not expected(RING, version):
        with pytest.raises(CapabilityError, match=r"EINVAL: policy 5\.10 has no dirty rings"):
            spte.VM("npt", version, ring_bytes=4096)
        return
    assert len(spte.VM("npt", version, ring_bytes=4096).vcpus[0].ring) == 256
    late = "comes too late" if expected(ACQ_REL, version) else "has no dirty_log_ring_acq_rel"
    with pytest.raises(CapabilityError, match=late):
        spte.VM("npt", version).enable_cap("dirty_log_ring_acq_rel", 4096)
    with pytest.raises(CapabilityError, match="comes too late"):
        spte.VM("npt", version).enable_cap("dirty_log_ring", 4096)


@pytest.mark.parametrize("high", [0, 1, 12345, (1 << 32) - 1])
def test_a_ring_has_32_bits_of_size(high):
    above = high << 32
    assert len(spte.VM("npt", ring_bytes=above + 65536).vcpus[0].ring) == 4096
    for low, error, why in (
        (0, CapabilityError, "is not a power of two; take 4096"), (65537, CapabilityError, "is not a power of two; take 131072"),
        (1024, CapabilityError, "is too small; take at least 4096"), (1 << 21, RingTooLargeError, "is too large; take at most 1048576"),
        (3 << 30, CapabilityError, "is not a power of two; take 1048576"),
    ):  # fmt: skip
        if above + low:  # 0: no ring is asked for
            with pytest.raises(error, match=f"ring of {above + low} bytes.*{why}"):
                spte.VM("npt", ring_bytes=above + low)
        with pytest.raises(error, match=f"ring of {above + low} bytes.*{why}"):
            spte.VM("npt").enable_cap("dirty_log_ring", above + low)
    with pytest.raises(CapabilityError, match="ring of 65536 bytes comes too late"):
        spte.VM("npt").enable_cap("dirty_log_ring", above + 65536)


@pytest.mark.parametrize("size", [1 << 64, -(1 << 63) - 1, 10**5000], ids=int.bit_length)
def test_no_ring_has_more_than_the_64_bits_of_an_argument(size):
    for call in (lambda: spte.VM("npt", ring_bytes=size), lambda: spte.VM("npt").enable_cap("dirty_log_ring", size)):
        with pytest.raises(CapabilityError, match=r"EINVAL: .*=.* does not fit 64 bits; no call of KVM takes it"):
            call()
