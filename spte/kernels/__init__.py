"""Kernels. Six are public on plain uint64 arrays, for people who bring their own tables; each returns what it changed."""

from spte.kernels._clear_dirty import clear_dirty
from spte.kernels._collapse import collapse
from spte.kernels._harvest import harvest
from spte.kernels._pml_flush import pml_flush
from spte.kernels._split import split
from spte.kernels._write_protect import write_protect

__all__ = ["clear_dirty", "collapse", "harvest", "pml_flush", "split", "write_protect"]
