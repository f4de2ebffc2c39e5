"""Random and typical programs that tests run."""
