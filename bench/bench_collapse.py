"""Recovery of 2 MiB leaves in place."""

from spte import ratios


def test_recover_in_place(compare, huge_guest):
    compare(ratios.collapse(huge_guest))
