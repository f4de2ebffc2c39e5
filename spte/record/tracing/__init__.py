"""The tracer, a process of its own: stops of a thread, system calls in another process, and who follows the target."""
