"""Clear-dirty of a slot."""

from spte.limits import cases as ratios


def test_clear_dirty_in_arena_order(compare, guest):
    compare(ratios.clear_dirty(guest))
