"""Locks on open files against other processes, on platforms that have them."""

from typing import IO

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None  # type: ignore[assignment] # checked before each use

__all__ = ["HAS_LOCKS", "lock_file"]

HAS_LOCKS = fcntl is not None


def lock_file(file: IO, *, wait: bool = False) -> None:
    """Lock a file until it is closed or this process ends.

    Args:
      file: an open file. The platform must have locks (`HAS_LOCKS`).
      wait: whether to wait for another process that holds the lock.

    Raises:
      BlockingIOError: if another process holds the lock and `wait` is false.
      OSError: if the file system does not support locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
