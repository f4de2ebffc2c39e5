"""The command line as tests call it: in this process, by its words."""

import contextlib
import resource
import signal

import numpy as np

from spte.cli.app import run
from spte.trace import Trace, save


def spte(capsys, *argv):
    """Return exit code, output and errors of ``spte ARGV...``."""
    code = run([str(a) for a in argv])
    return code, *capsys.readouterr()


def refused(capsys, *argv, code=2):
    """Return the one line with which ``spte ARGV...`` is refused."""
    got, out, err = spte(capsys, *argv)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("spte")
    return err


def save_toy(path, about="a toy"):
    """Save 4 MiB of which 100 pages are written in each tenth of a second; return the path as a word."""
    gfn = np.concatenate([np.arange(e * 100, e * 100 + 100) for e in range(5)]).astype(np.uint32)
    save(Trace(np.arange(6) * 100_000_000, np.arange(6) * 100, gfn, 1024, {"command": about}), path)
    return str(path)


@contextlib.contextmanager
def files_of_at_most(nbytes):
    """What a full disk does, without one: a write beyond so many bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
