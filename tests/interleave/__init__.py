"""Every interleaving of small programs on one VM, as Loom does it for Rust: kernels as plain Python, a switch at each shared word."""
