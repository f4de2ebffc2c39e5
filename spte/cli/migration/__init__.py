"""What the verbs about migrations share: options, tables, pictures."""
