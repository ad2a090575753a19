"""Checks and benchmarks for a few minutes on a GPU, each part in a separate process.

`command.py` starts one process per job, enforces the time limits, and writes results as they
arrive. The other modules run in those processes.
"""
