"""The console script: outside the package, as importing that takes a while in which Ctrl-C must not end in a traceback."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with one line and exit code 130, as shells have it."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored: a run in the background
    if heeded:
        signal.signal(signal.SIGINT, _leave)  # not an exception: NumPy's import makes an ImportError of it
    from spte.cli import main as run

    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        _leave()
    finally:
        if heeded:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said: the interpreter's own end has no line of its own


def _leave(*_: object) -> None:
    if sys.stderr is not None:  # closed
        os.write(2, b"spte: interrupted\n")
    os._exit(130)
