"""Eager split of 2 MiB leaves."""

from spte.limits import cases as ratios


def test_eager_split(compare, huge_guest):
    compare(ratios.split(huge_guest))
