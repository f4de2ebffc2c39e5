"""The command line. Nothing outside this package knows the terminal."""

from __future__ import annotations

import sys

from spte.cli.exit_codes import EXIT_MISSING


def main() -> None:
    """Run the command line on `sys.argv` and exit the process with its code."""
    try:
        from spte.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(f"spte: the command line needs {error.name}; pip install 'kvm-spte[cli]'", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_MISSING)
    sys.exit(run(sys.argv[1:]))
