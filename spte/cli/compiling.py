"""The one line about the first run that every verb prints which runs kernels."""

from __future__ import annotations

import click

from spte._numba import jit as _jit


def announce_compilation() -> None:
    """Say on stderr that kernels will be compiled, unless the cache has them."""
    if not _jit.is_warm():
        click.echo("spte: first run: compiling the kernels for this machine, about half a minute, once", err=True)
