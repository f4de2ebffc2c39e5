"""What can be seen of tables and counters: listings, statistics, invariants, tracepoints. Arrays in, values out."""
