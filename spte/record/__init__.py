"""Which pages a program writes, epoch by epoch, as the kernel tracks them: `spte record`.

The floors, lowest first: `abi` (numbers and structures of the kernel), `ptrace` (stops of one thread), `inject` (system calls in
another process), `tracer` (a process of its own that follows the target), `maps` and `tracker` (what is written), `journal` (the
epochs on disk), `recorder` (a recording from start to end).
"""
