"""Digests of files, taken again only when a file has been touched."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from jaxcl.host.files import open_regular, read_sealed_json, write_sealed_json

__all__ = ["DIGESTS_FILE", "file_digests"]

DIGESTS_FILE = ".jaxcl_digests.json"
"""Lies next to the files, if it can: name -> size, time of the last change, sha256."""

_BYTES_AT_ONCE = 2**22


def file_digests(directory: Any, paths: Sequence[Any]) -> list[str]:
    """Compute a digest of each file; the digests of files that have not changed are cached.

    Args:
      directory: the folder of the files, local or in a bucket; the cache is its `DIGESTS_FILE`.
      paths: the files.
    """
    remembered = directory / DIGESTS_FILE
    try:
        known = read_sealed_json(remembered)
    except (OSError, ValueError):
        known = {}
    found = {}
    for path in paths:
        touched = _last_touched(path)
        if known.get(path.name, [None])[:-1] == touched:
            found[path.name] = known[path.name]
        else:
            found[path.name] = [*touched, _digest(path)]
    if (remember := known | found) != known:  # which holds other splits' files, too
        with contextlib.suppress(
            OSError
        ):  # in a folder without write access they are computed each time
            write_sealed_json(remembered, remember)
    return [found[path.name][-1] for path in paths]


def _last_touched(path: Any) -> list[int]:
    try:
        local = os.stat(path)
        return [local.st_size, local.st_mtime_ns]
    except OSError:  # in a bucket
        remote = path.stat()
        return [remote.length, remote.mtime]


def _digest(path: Any) -> str:
    whole = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_BYTES_AT_ONCE):
            whole.update(piece)
    return whole.hexdigest()
