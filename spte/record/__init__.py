"""Which pages a program writes, epoch by epoch, as the kernel tracks them: `spte record`.

The floors, lowest first: `abi` (numbers and structures of the kernel), `tracing` (a process of its own that follows the
target: `ptrace`, `inject`, `restart`, `tracer`), `maps` and `tracker` (what is written), `journal` (the
epochs on disk), `recorder` (a recording from start to end).
"""
