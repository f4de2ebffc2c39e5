"""Write-protect of a slot."""

import pytest

from spte.limits import cases as ratios

BOTH_VENDORS = pytest.mark.parametrize("guest", ["ept-pml", "npt"], indirect=True)


@BOTH_VENDORS
def test_write_protect_in_arena_order(compare, guest):
    compare(ratios.write_protect(guest))


def test_write_protect_walking_four_levels(compare, guest):
    compare(ratios.write_protect_by_walk(guest))


def test_write_protect_by_two_threads(compare, guest):
    compare(ratios.write_protect_by_two(guest))
