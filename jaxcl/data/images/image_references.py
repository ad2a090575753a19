"""References to images: the bytes of a file, a path next to the rows, or a member of a tar.

The cache of files of pairs holds one reference per image, and the images are read when a batch
needs them. Only regular files inside the folder of the rows are read.
"""

import errno
import functools
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jaxcl.data.images.decoding import MAX_IMAGE_BYTES, BadImage
from jaxcl.data.images.image_threads import in_threads
from jaxcl.host.files import open_regular, read_regular

__all__ = [
    "TarMember",
    "as_reference",
    "read_inside",
    "read_references",
    "reference_place",
    "referenced_paths",
]

_TRANSIENT = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
"""Errors of the machine or the network. They stop the run, so that no image is cached as bad."""
_MAX_PATH = 4096
_OPEN_TARS = 64
_FEW = 4
"""The minimum number of files to read in threads instead of one by one."""

_BYTES, _PATH, _MEMBER = b"B", b"P", b"T"


class TarMember(NamedTuple):
    """A file in an uncompressed tar.

    Attributes:
      name: the file's name in the tar.
      offset: the position of the file's first byte in the tar.
      size: the size of the file, in bytes.
    """

    name: str
    offset: int
    size: int


class _Reference(NamedTuple):
    """A decoded reference.

    Attributes:
      number: the index of the file of rows.
      path: a path relative to that file's folder, or the name of a tar's member.
      where: the offset and size of a tar's member.
    """

    number: int
    path: str
    where: tuple[int, int] | None


def as_reference(value: Any, *, number: int) -> bytes:
    """Encode the value of an image column as a reference.

    Args:
      value: the bytes of an image file, a path relative to the folder of the rows, a mapping of
        `"bytes"` and `"path"` as Hugging Face's `datasets` writes it, or a `TarMember`.
      number: the index of the file of rows; paths are relative to that file's folder.

    Raises:
      BadImage: for any other value.
    """
    if isinstance(value, TarMember):
        return _MEMBER + f"{number} {value.offset} {value.size} {value.name}".encode()
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        if not value:
            raise BadImage("the file is empty")
        return _BYTES + value
    if isinstance(value, str) and value:
        if len(value) > _MAX_PATH or "\0" in value:
            raise BadImage(f"{value:.40}… is not a path")
        try:
            return _PATH + f"{number} {value}".encode()
        except UnicodeEncodeError as error:
            raise BadImage(f"the path is not UTF-8 ({error.reason})") from error
    if value is None or value == "":
        raise BadImage("there is no image")
    raise BadImage(f"{value!r:.40} is neither a path nor the bytes of an image file")


def read_references(references: Sequence[bytes], paths: Sequence[Path]) -> list[bytes]:
    """Read the image files that references point to.

    Args:
      references: results of `as_reference`.
      paths: the files or folders of rows, to which the references refer by index.

    Raises:
      BadImage: if a file is missing, or not a regular file inside the folder of the rows.
    """
    distinct = list(dict.fromkeys(references))  # several captions may refer to one image
    read = functools.partial(_read, paths=paths)
    if sum(reference[:1] == _PATH for reference in distinct) < _FEW:
        files = dict(zip(distinct, map(read, distinct), strict=True))
    else:
        files = dict(zip(distinct, in_threads(read, distinct, purpose="reading"), strict=True))
    return [files[reference] for reference in references]


def reference_place(reference: bytes, paths: Sequence[Path]) -> str | None:
    """The name of the file that a reference points to; `None` for bytes in the rows themselves."""
    parsed = _parsed(reference)
    if parsed is None:
        return None
    return parsed.path if parsed.where is None else f"{paths[parsed.number].name}/{parsed.path}"


def referenced_paths(references: Iterable[bytes]) -> set[tuple[int, str]]:
    """The paths in some references, each with the index of its file of rows."""
    parsed = (_parsed(reference) for reference in references if reference[:1] == _PATH)
    return {one[:2] for one in parsed if one is not None}


def _parsed(reference: bytes) -> _Reference | None:
    kind, content = reference[:1], reference[1:]
    if kind == _BYTES:
        return None
    if kind == _PATH:
        number, path = content.decode().split(" ", 1)
        return _Reference(int(number), path, None)
    number, offset, size, name = content.decode().split(" ", 3)
    return _Reference(int(number), name, (int(offset), int(size)))


def _read(reference: bytes, *, paths: Sequence[Path]) -> bytes:
    parsed = _parsed(reference)
    if parsed is None:
        return reference[1:]
    base = paths[parsed.number]
    if parsed.where is not None:
        return _read_member(base, *parsed.where)
    return read_inside(base if base.is_dir() else base.parent, parsed.path)


def read_inside(folder: Path, name: str) -> bytes:
    """Read a file inside a folder.

    Raises:
      BadImage: if there is no such file, or `name` is absolute, has "..", or leads outside of the
        folder through a link.
    """
    path = PurePosixPath(name)
    if "://" in name:
        raise BadImage(f"{name} is a URL; download it, and give its path")
    if path.is_absolute() or ".." in path.parts:
        raise BadImage(f"{name} leads outside of {folder}, and only files inside of it are read")
    real = os.path.realpath(folder / path)
    root = os.path.realpath(folder)
    if os.path.commonpath([real, root]) != root:
        raise BadImage(f"{name} is a link that leads outside of {folder}")
    try:
        return read_regular(Path(real), limit=MAX_IMAGE_BYTES)
    except FileNotFoundError as error:
        raise BadImage(f"{name} does not exist in {folder}") from error
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise  # otherwise the image would be cached as bad
        raise BadImage(f"{name} cannot be read ({error})") from error
    except ValueError as error:
        raise BadImage(f"{name} cannot be read ({error})") from error


def _read_member(path: Path, offset: int, size: int) -> bytes:
    try:
        tar = _opened_tar(path)  # this reference keeps other threads from closing it
        content = os.pread(tar.fileno(), size, offset)
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise
        raise BadImage(f"{path} cannot be read ({error})") from error
    except ValueError as error:
        raise BadImage(f"{path} cannot be read ({error})") from error
    if len(content) < size:
        raise BadImage(f"{path} is truncated")
    return content


class _OpenTar:
    """A file that is closed when the last reference to it is gone."""

    def __init__(self, path: Path) -> None:
        file = open_regular(path)
        self.fileno = file.fileno
        weakref.finalize(self, file.close)


_opened_tar = functools.lru_cache(_OPEN_TARS)(_OpenTar)
