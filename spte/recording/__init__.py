"""Recordings of real KVM: files of JSON lines, one op a line."""

from spte.recording.file import Recording, find, read, read_all, write

__all__ = ["Recording", "find", "read", "read_all", "write"]
