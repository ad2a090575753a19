"""The host: processes, progress, memory and files."""
