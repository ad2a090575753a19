"""What object stores do otherwise than disks: no file is appended to, locked or mapped to memory.

Each function also takes a local path, for which it does what `pathlib` and `shutil` do.
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
"""Of the time, for uploads of a log."""


def local_folder(folder: AnyPath) -> Path:
    """The folder itself, or one in the user's cache for the files of a remote one that must be
    local: those that are mapped to memory, or written by libraries that know no object store."""
    if not is_remote(folder):
        return Path(folder)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(folder))[-100:]
    return cache_folder() / "remote" / f"{name}-{digest_of(str(folder).encode())[:8]}"


def file_sizes(folder: AnyPath) -> dict[str, int]:
    """The bytes of each file in a folder and in those below, by its path inside."""
    if is_remote(folder):
        system, root = _file_system(folder)
        found = system.find(root, detail=True)
        return {name[len(root) :].lstrip("/"): found[name]["size"] for name in sorted(found)}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def remove_tree(folder: AnyPath) -> None:
    """Remove a folder with all that it holds; what cannot be removed stays."""
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
    """Write a remote file that is not there yet, of which the stores of Amazon, Google and
    Microsoft make sure.

    Raises:
      FileExistsError: if it is there.
    """
    system, name = _file_system(path)
    system.pipe_file(name, content, mode="create")


def open_log(path: AnyPath) -> io.BufferedIOBase:
    """Open a file to append to it."""
    return RemoteLog(path) if is_remote(path) else path.open("ab")


class RemoteLog(io.BytesIO):
    """A remote file that grows: kept in memory, and now and then uploaded as a whole.

    A flush uploads it if the last upload was half a minute ago, or longer for a log whose uploads
    take longer, so that they never take more than 2% of the time.

    Args:
      path: of the file, which may have content.
    """

    def __init__(self, path: AnyPath):
        content = read_regular(path, limit=_MAX_BYTES) if path.exists() else b""
        super().__init__(content)
        self.seek(0, io.SEEK_END)
        self._path, self._uploaded, self._due = path, len(content), time.monotonic()

    def flush(self) -> None:
        """Upload the content if that is due."""
        if time.monotonic() >= self._due:
            self.upload()

    def upload(self) -> None:
        """Upload the content if it has grown."""
        if self._uploaded == self.tell():
            return
        begun = time.monotonic()
        write_whole(self._path, self.getvalue())
        self._uploaded, now = self.tell(), time.monotonic()
        self._due = now + max(_UPLOAD_SECONDS, (now - begun) / _MAX_SHARE)

    def close(self) -> None:
        """Upload the rest."""
        if not self.closed:
            self.upload()
        super().close()


def _file_system(path: AnyPath) -> tuple[Any, str]:
    """The file system of a remote path, and the path as that spells it."""
    from fsspec.core import url_to_fs

    return url_to_fs(str(path))
