"""Recovery of 2 MiB leaves in place."""

import pytest

from spte.limits import cases as ratios


@pytest.mark.parametrize("beside_leaves", [False, True], ids=["parents", "leaves"])
def test_recover_in_place(compare, huge_guest, beside_leaves):
    compare(ratios.collapse(huge_guest, beside_leaves=beside_leaves))
