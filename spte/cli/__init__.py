"""The command line. Nothing outside this package knows the terminal."""

from __future__ import annotations

import sys

EXIT_OK = 0
EXIT_DIFFERENCE = 1
"""A difference, or a loss."""
EXIT_BAD_INPUT = 2
EXIT_MISSING = 4
"""The host lacks a piece, such as an optional dependency."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main() -> None:
    """Run the command line on `sys.argv` and exit the process with its code."""
    try:
        from spte.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(f"spte: the command line needs {error.name}; pip install 'kvm-spte[cli]'", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_MISSING)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(run(sys.argv[1:]))
