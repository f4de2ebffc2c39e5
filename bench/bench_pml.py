"""Flush of PML buffers."""

from spte.limits import cases as ratios


def test_pml_drain(compare, guest):
    compare(ratios.pml_drain(guest))
