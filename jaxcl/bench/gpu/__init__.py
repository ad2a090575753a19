"""What can be checked and timed in the first minutes on a GPU, each part in its own process.

`command.py` supervises: it starts one process per job, keeps to the time limits and writes results
as they arrive. The other modules measure, in those processes.
"""
