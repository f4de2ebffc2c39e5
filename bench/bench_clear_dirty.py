"""Clear-dirty of a slot."""

from spte import ratios


def test_clear_dirty_in_arena_order(compare, guest):
    compare(ratios.clear_dirty(guest))
