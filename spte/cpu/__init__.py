"""Runs of guest accesses."""
