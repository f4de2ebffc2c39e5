"""Kernels. Six are public on plain uint64 arrays, for people who bring their own tables; the VM runs the same leaf loops.

Each returns what it changed. `layout` prepares what a platform means for them.
"""

from spte.kernels._clear_dirty import clear_dirty
from spte.kernels._collapse import collapse
from spte.kernels._harvest import harvest
from spte.kernels._layout import layout
from spte.kernels._pml_flush import pml_flush
from spte.kernels._split import split
from spte.kernels._write_protect import write_protect

__all__ = ["clear_dirty", "collapse", "harvest", "layout", "pml_flush", "split", "write_protect"]
