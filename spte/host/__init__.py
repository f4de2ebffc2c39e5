"""The host: its pages, the memory behind memslots, and who hears when they change."""
