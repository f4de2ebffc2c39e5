"""One module a verb; it is imported when its verb is called."""
