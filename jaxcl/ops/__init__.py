"""The heavy arithmetic: a folder per family of operations, its definition beside what is fast."""
