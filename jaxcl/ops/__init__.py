"""Compute-intensive operations; a folder per family has the reference and fast implementations."""
