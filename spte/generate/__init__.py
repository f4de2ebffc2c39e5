"""Write traces by the patterns that people name, deterministic by their seed."""

from spte.generate.patterns import PATTERNS, Pattern
from spte.generate.run import generate, perf_test

__all__ = ["PATTERNS", "Pattern", "generate", "perf_test"]
