"""Files on object stores, which can neither be appended to nor mapped into memory.

All functions except `create_file` also take local paths.
"""

import io
import re
import shutil
import time
from pathlib import Path
from typing import Any

from jaxcl.host.files import digest_of, is_remote, read_regular, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.user_folders import cache_folder

__all__ = [
    "RemoteLog",
    "create_file",
    "file_sizes",
    "local_folder",
    "move_tree",
    "open_log",
    "remove_tree",
]

_MAX_BYTES = 2**30
_UPLOAD_SECONDS = 30.0
_MAX_SHARE = 0.02
"""The largest share of time for uploads of a log."""


def local_folder(folder: AnyPath) -> Path:
    """Return a local folder unchanged, and for a remote one a folder in the user's cache.

    Use it for files that must be on a local disk, for example to map them into memory.
    """
    if not is_remote(folder):
        return Path(folder)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(folder))[-100:]
    return cache_folder() / "remote" / f"{name}-{digest_of(str(folder).encode())[:8]}"


def file_sizes(folder: AnyPath) -> dict[str, int]:
    """The size in bytes of every file below a folder, by the file's path relative to the folder."""
    if is_remote(folder):
        system, root = _file_system(folder)
        details = system.find(root, detail=True)
        return {name[len(root) :].lstrip("/"): details[name]["size"] for name in sorted(details)}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def remove_tree(folder: AnyPath) -> None:
    """Remove a folder and its content; local files that cannot be removed stay."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        system, root = _file_system(folder)
        system.rm(root, recursive=True)


def move_tree(folder: AnyPath, target: AnyPath) -> None:
    """Move a folder to another name in the same file system."""
    if is_remote(folder):
        system, root = _file_system(folder)
        system.mv(root, str(target), recursive=True)
    else:
        shutil.move(folder, target)


def create_file(path: AnyPath, content: bytes) -> None:
    """Create a remote file; if several processes try, only one succeeds.

    The stores of Amazon, Google and Microsoft guarantee this. Other stores may only check first
    whether the file exists.

    Raises:
      FileExistsError: if the file exists.
    """
    system, name = _file_system(path)
    system.pipe_file(name, content, mode="create")


def open_log(path: AnyPath) -> io.BufferedIOBase:
    """Open a file to append to it."""
    return RemoteLog(path) if is_remote(path) else path.open("ab")


class RemoteLog(io.BytesIO):
    """A remote file that grows: kept in memory, and uploaded as a whole.

    `flush` uploads the file if the last upload was half a minute ago, or longer if uploads would
    otherwise take more than 2% of the time.

    Args:
      path: the file, which may already have content.
    """

    def __init__(self, path: AnyPath):
        content = read_regular(path, limit=_MAX_BYTES) if path.exists() else b""
        super().__init__(content)
        self.seek(0, io.SEEK_END)
        self._path, self._uploaded, self._due = path, len(content), time.monotonic()

    def flush(self) -> None:
        """Upload the content if an upload is due."""
        if time.monotonic() >= self._due:
            self.upload()

    def upload(self) -> None:
        """Upload the content if it has grown."""
        if self._uploaded == self.tell():
            return
        start = time.monotonic()
        write_whole(self._path, self.getvalue())
        self._uploaded, now = self.tell(), time.monotonic()
        self._due = now + max(_UPLOAD_SECONDS, (now - start) / _MAX_SHARE)

    def close(self) -> None:
        """Upload the content if it has grown, and close the log."""
        if not self.closed:
            self.upload()
        super().close()


def _file_system(path: AnyPath) -> tuple[Any, str]:
    """The file system of a remote path, and the path within it."""
    from fsspec.core import url_to_fs

    return url_to_fs(str(path))
