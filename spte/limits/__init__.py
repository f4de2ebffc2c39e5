"""Every kernel beside what the machine can do."""
