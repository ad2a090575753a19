"""The rows of an uncompressed tar in the layout of WebDataset.

Members that share a key are one row: `dir/0001.jpg`, `dir/0001.txt` and `dir/0001.json`. The key is
the path up to the first dot of the file's name, and the rest is the extension, in lower case. The
members of a key must be adjacent. Images are not copied: a row holds their positions in the tar.
"""

import tarfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from jaxcl.data.images.image_references import TarMember
from jaxcl.data.text_files import json_object
from jaxcl.settings.file_kinds import IMAGE_SUFFIXES

__all__ = ["tar_fields", "tar_rows"]

_MAX_TEXT = 64 * 2**20
_ROWS_WITH_FIELDS = 100
_JSON_PREFIX = "json."


def tar_fields(file: Any, wanted: Collection[str] = ()) -> list[str]:
    """The names of the fields of the first rows.

    Args:
      file: the opened tar.
      wanted: fields to look for beyond the first 100 rows.

    Raises:
      ValueError: if the tar is damaged.
    """
    names: dict[str, None] = {}
    for number, row in enumerate(tar_rows(file)):
        if number >= _ROWS_WITH_FIELDS and names.keys() >= set(wanted):
            break
        names |= dict.fromkeys(row[0])
    return list(names)


def tar_rows(
    file: Any, fields: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Iterate over the rows of a tar.

    Args:
      file: the opened tar.
      fields: the fields to read; `None` reads all.

    Yields:
      The fields of a row, and why it cannot be read, or `None` if it can. Fields are `"__key__"`;
      `"image"`, the first image as a `TarMember`; each other image by its extension; texts by their
      extension, such as `"txt"` and `"cls"`; `"caption"`, the same as `"txt"`; and `"json.NAME"`
      for each entry of a `.json`.

    Raises:
      ValueError: if the tar is damaged or compressed, or the members of a key are not adjacent.
    """
    with _opened(file) as tar:
        done: set[str] = set()
        for key, members in _samples(tar):
            if key in done:
                raise ValueError(
                    f"the members of {key} are not adjacent; write the tar sorted by name"
                )
            done.add(key)
            yield _row(tar, key, members, fields)


def _opened(file: Any) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise ValueError(f"it is not an uncompressed tar ({error})") from error


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield each key with its members by extension."""
    current = ""
    members: dict[str, tarfile.TarInfo] = {}
    end = 0
    while (member := _next(tar)) is not None:
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not member.isfile():
            continue
        if member.issparse():
            raise ValueError(f"{member.name} is a sparse file; write the tar without --sparse")
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != current and members:
            yield current, members
            members = {}
        current, extension = key, extension.lower()
        if extension in members:
            raise ValueError(f"there are two members {member.name}; remove one")
        members[extension] = member
    if members:
        yield current, members
    _check_end(tar, end)


def _check_end(tar: tarfile.TarFile, end: int) -> None:
    """Check the block of zeros at the end, because `tarfile` accepts a truncated tar."""
    tar.fileobj.seek(end)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError("the tar is truncated (it has no end mark); write it again")


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
        tar.members = []  # type: ignore[attr-defined] # otherwise all stay in memory
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the tar is damaged ({error}); write it again") from error
    return member


def _row(
    tar: tarfile.TarFile,
    key: str,
    members: dict[str, tarfile.TarInfo],
    fields: Sequence[str] | None,
) -> tuple[dict[str, Any], str | None]:
    row: dict[str, Any] = {"__key__": key}
    try:
        for extension, member in members.items():
            if f".{extension}".endswith(IMAGE_SUFFIXES):
                image = TarMember(member.name, member.offset_data, member.size)
                row.setdefault("image", image)
                row[extension] = image
            elif extension == "json":
                if fields is None or any(name.startswith(_JSON_PREFIX) for name in fields):
                    row |= _entries(_text(tar, member), member.name)
            elif fields is None or extension in fields or extension == "txt":
                row[extension] = _text(tar, member)
                if extension == "txt":
                    row["caption"] = row[extension]
    except ValueError as error:
        return row, str(error)
    return row, None


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _MAX_TEXT:
        raise ValueError(f"{member.name} has more than {_MAX_TEXT:,} bytes")
    file = tar.extractfile(member)
    try:
        return "" if file is None else file.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name} is not UTF-8 ({error.reason})") from error
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{member.name} is truncated ({error})") from error


def _entries(text: str, name: str) -> dict[str, Any]:
    entries = json_object(text, name)
    return {f"{_JSON_PREFIX}{entry}": value for entry, value in entries.items()}
