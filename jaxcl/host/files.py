"""Reads files with a size limit, and writes files atomically.

Only regular files are read, so that a pipe or a device under a file's name is an error and does not
hang the program. A file is written under a temporary name, synced to disk, then renamed.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from jaxcl.host.paths import AnyPath

__all__ = [
    "JsonLines",
    "digest_of",
    "is_remote",
    "open_regular",
    "read_json_lines",
    "read_json_object",
    "read_regular",
    "read_sealed_json",
    "read_text",
    "replacing",
    "write_npz",
    "write_sealed_json",
    "write_whole",
]

_MAX_BYTES = 64 * 2**20
"""The largest JSON file that is read, in bytes; files in practice have at most a few million."""
_MAX_LOG_BYTES = 2**30
"""The largest file of JSON lines, such as a run's metrics, that is read, in bytes."""


def is_remote(path: Any) -> bool:
    """Whether a path has a scheme, such as `gs://`, so that only `etils.epath` can open it."""
    return "://" in os.fspath(path)


def open_regular(path: Any) -> io.IOBase:
    """Open a regular file to read its bytes; links are followed.

    Args:
      path: a `pathlib.Path` or `etils.epath.Path`.

    Raises:
      ValueError: if the path names a folder, a pipe or a device.
      OSError: if it cannot be opened.
    """
    if is_remote(path):
        return path.open("rb")
    try:
        file = open(path, "rb", opener=_opened_without_waiting)  # noqa: SIM115 - the caller closes it
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; give a regular file") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is a pipe or a device; give a regular file")
    return file


def _opened_without_waiting(path: str, flags: int) -> int:
    # Otherwise opening a pipe waits until another process writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_regular(path: Any, *, limit: int) -> bytes:
    """Read the bytes of a regular file.

    Args:
      path: a `pathlib.Path` or `etils.epath.Path`.
      limit: the maximum size, in bytes; at most one more byte is read.

    Raises:
      ValueError: if the file is larger, or not a regular file.
      OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes; give a smaller file")
    return content


def read_text(path: Any, *, limit: int = _MAX_BYTES) -> str:
    """Read a regular file as UTF-8.

    Raises:
      ValueError: if the file is larger than `limit` bytes, not UTF-8, or not a regular file.
      OSError: if it cannot be read.
    """
    try:
        return read_regular(path, limit=limit).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); write it in that encoding") from error


def read_json_object(
    path: Any, *, remedy: str = "restore it from a copy, or create it again"
) -> dict[str, Any]:
    """Read a JSON file of limited size that holds an object.

    Args:
      path: a `pathlib.Path` or `etils.epath.Path`.
      remedy: advice about a damaged file, for the message.

    Raises:
      ValueError: if the file has more than 64 MiB, does not hold a JSON object, or is not a regular
        file.
      OSError: if it cannot be read.
    """
    raw = read_regular(path, limit=_MAX_BYTES)
    try:
        # TFDS reads these files in the locale's encoding. In another encoding, the same file could
        # name different classes.
        content = json.loads(io.TextIOWrapper(io.BytesIO(raw)).read())
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    return content


def digest_of(content: bytes) -> str:
    """A digest of some bytes: 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_sealed_json(path: Any) -> Any:
    """Read a value that `write_sealed_json` wrote.

    Raises:
      ValueError: if the file holds anything else, or has changed since it was written.
      OSError: if it cannot be read.
    """
    sealed = read_json_object(path)
    content = sealed.get("content")
    if sealed.get("digest") != digest_of(_canonical(content)):
        raise ValueError(f"{path} has changed since it was written")
    return content


def write_sealed_json(path: Any, content: Any) -> None:
    """Write a value as JSON together with its digest."""
    write_whole(path, json.dumps({"digest": digest_of(_canonical(content)), "content": content}))


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


class JsonLines(NamedTuple):
    """The records of a file with a JSON object in each line.

    Attributes:
      records: the objects, in order.
      damaged: the lines that are not JSON objects, except empty lines.
    """

    records: list[dict[str, Any]]
    damaged: list[bytes]


def read_json_lines(path: Any) -> JsonLines:
    """Read a file with a JSON object in each line.

    Raises:
      ValueError: if the file has more than 1 GiB, or is not a regular file.
      OSError: if it cannot be read.
    """
    lines = JsonLines([], [])
    for line in filter(bytes.strip, read_regular(path, limit=_MAX_LOG_BYTES).split(b"\n")):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            lines.records.append(record)
        else:
            lines.damaged.append(line)
    return lines


def write_whole(path: Any, content: str | bytes) -> None:
    """Write a file atomically: readers find either all of the new content or the previous file.

    Args:
      path: a `pathlib.Path` or `etils.epath.Path`.
      content: the whole content; text is written as UTF-8.

    Raises:
      OSError: if the file cannot be written; the message names it.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_npz(path: AnyPath, **arrays: np.ndarray) -> None:
    """Write arrays to an `.npz` atomically, creating its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


@contextlib.contextmanager
def replacing(path: Any) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, and move it to the path once it is complete.

    A local file has a `name`, so that other libraries can write to it.

    Args:
      path: a `pathlib.Path` or `etils.epath.Path`.

    Raises:
      OSError: if the file cannot be written; the message names the path.
    """
    if is_remote(path):
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())  # atomic on object stores
        return
    # The name is random, and mode "x" follows no links, so that no other file is overwritten.
    unfinished = path.with_name(f"{path.name}.unfinished-{secrets.token_hex(4)}")
    try:
        with open(unfinished, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(unfinished, stat.S_IMODE(os.stat(path).st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        if isinstance(error, OSError) and error.filename is None:  # such as when the disk is full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Any) -> None:
    """Sync a folder's list of files to disk, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
