"""Dirty logging of single pages: re-arm by mask, harvest, rings, PML."""
