"""Folders that are written under a temporary name, and renamed when they are complete."""

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxcl.host.file_locks import HAS_LOCKS, lock_file

__all__ = ["put_in_place", "staging_folder"]

_MARK = ".unfinished-"
_LOCK = ".lock"
_SECONDS_OF_A_DAY = 24 * 60 * 60


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder next to `path` for a folder that `put_in_place` moves to `path`.

    The folder is removed on exit. Folders of killed processes are removed on entry; a running
    process holds a lock on its own folder.

    Args:
      path: the final path; its parent folder is created if necessary.

    Raises:
      OSError: if the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    suffix = secrets.token_hex(4)
    folder = path.with_name(f"{path.name}{_MARK}{suffix}")
    unseen = path.with_name(f".{path.name}-{suffix}")
    unseen.mkdir()  # tempfile would deny other users access to it
    try:
        with (unseen / _LOCK).open("w") as lock:
            _try_lock(lock)
            unseen.rename(folder)  # other processes check the lock from now on
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(staged: Path, path: Path, *, replace: bool) -> None:
    """Move a folder within a staging folder to its final path.

    Args:
      staged: the folder within a staging folder.
      path: the final path.
      replace: whether to replace an existing folder at that path. If false, and another process has
        already created the folder, `staged` stays where it is.

    Raises:
      OSError: if the parent folder of the path cannot be written.
    """
    if replace:
        with contextlib.suppress(FileNotFoundError):
            path.rename(staged.with_name(f"{staged.name}.replaced"))
    try:
        staged.rename(path)
    except OSError:
        if not path.exists():
            raise


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"*{_MARK}*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    lock_file = folder / _LOCK
    if not lock_file.exists():  # earlier versions locked nothing
        return time.time() - folder.stat().st_mtime > _SECONDS_OF_A_DAY
    with lock_file.open("r+") as lock:
        return _try_lock(lock)


def _try_lock(file: IO) -> bool:
    """Try to lock a file until it is closed; return whether this process now holds the lock."""
    if not HAS_LOCKS:  # the folders of killed processes stay
        return False
    try:
        lock_file(file)
    except OSError:  # held, or a file system without locks
        return False
    return True
