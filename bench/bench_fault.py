"""Slow faults: the first touch of each page."""

import pytest

from spte.limits import cases as ratios


@pytest.mark.parametrize("order", ratios.ORDERS)
def test_first_touch(compare, guest, order):
    compare(ratios.first_touch(guest, order))
