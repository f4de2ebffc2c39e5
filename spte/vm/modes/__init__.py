"""What a guest turns on and leaves again: its paging, a guest of its own, system management mode."""
