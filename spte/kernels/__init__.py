"""Kernels. Six are public on plain uint64 arrays, for people who bring their own tables; each returns what it changed."""

from spte.kernels.clear_dirty import clear_dirty
from spte.kernels.collapse import collapse
from spte.kernels.harvest import harvest
from spte.kernels.pml_flush import pml_flush
from spte.kernels.split import split
from spte.kernels.write_protect import write_protect

__all__ = ["clear_dirty", "collapse", "harvest", "pml_flush", "split", "write_protect"]
