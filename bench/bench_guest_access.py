"""Guest writes at random to mapped pages."""

import pytest

from spte.limits import cases as ratios


@pytest.mark.parametrize("logs", [False, True], ids=["set", "pml"])
def test_random_guest_writes(compare, guest, logs):
    compare(ratios.guest_writes(guest, logs))
