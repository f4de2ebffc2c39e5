"""All that knows numba."""
