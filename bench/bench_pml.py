"""Flush of PML buffers."""

from spte import ratios


def test_pml_drain(compare, guest):
    compare(ratios.pml_drain(guest))
