"""A run: its folder, checkpoints, batches, metrics and reports."""
