"""Readers, one module a format: each gives the writes of its sources to a `spte.convert.writes.Writes`."""
