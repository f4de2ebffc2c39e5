"""Operations on all of a memslot, one a module."""
