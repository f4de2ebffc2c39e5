"""Harvest and re-arm: GET_DIRTY_LOG by fraction and pattern of dirty pages."""

import pytest

from spte.limits import cases as ratios

CASES = [(f, p) for f in ratios.FRACTIONS for p in ratios.PATTERNS if p == "random" or 0 < f < 1]


@pytest.mark.parametrize(("fraction", "pattern"), CASES)
def test_harvest(compare, guest, fraction, pattern):
    compare(ratios.harvest(guest, fraction, pattern))
