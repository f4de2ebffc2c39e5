"""Exit codes of the command line."""

EXIT_OK = 0
EXIT_DIFFERENCE = 1
"""A difference, or a loss."""
EXIT_BAD_INPUT = 2
EXIT_MISSING = 4
"""The host lacks a piece, such as an optional dependency."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
EXIT_TERMINATED = 143
"""128 + SIGTERM, likewise."""
