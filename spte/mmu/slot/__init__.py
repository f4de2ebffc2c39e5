"""One module an operation on a whole memslot."""
