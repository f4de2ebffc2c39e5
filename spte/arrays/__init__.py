"""The groups of arrays that travel into kernels, and memory for them."""
