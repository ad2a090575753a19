"""Digests of files, recomputed only when a file has changed."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from jaxcl.host.files import open_regular, read_sealed_json, write_sealed_json

__all__ = ["DIGESTS_FILE", "file_digests"]

DIGESTS_FILE = ".jaxcl_digests.json"
"""The cache of digests: file name -> size, time of the last change, sha256."""

_BYTES_AT_ONCE = 2**22


def file_digests(directory: Any, paths: Sequence[Any]) -> list[str]:
    """Compute a digest of each file; the digests of files that have not changed are cached.

    Args:
      directory: the folder of the cache file `DIGESTS_FILE`, local or in a bucket.
      paths: the files, all with different names.
    """
    cache_file = directory / DIGESTS_FILE
    try:
        cached = read_sealed_json(cache_file)
    except (OSError, ValueError):
        cached = {}
    entries = {}
    for path in paths:
        size_and_time = _size_and_time(path)
        if cached.get(path.name, [None])[:-1] == size_and_time:
            entries[path.name] = cached[path.name]
        else:
            entries[path.name] = [*size_and_time, _digest(path)]
    if (merged := cached | entries) != cached:  # the cache also holds the files of other splits
        # In a folder without write access, digests are computed each time.
        with contextlib.suppress(OSError):
            write_sealed_json(cache_file, merged)
    return [entries[path.name][-1] for path in paths]


def _size_and_time(path: Any) -> list[int]:
    try:
        local = os.stat(path)
        return [local.st_size, local.st_mtime_ns]
    except OSError:  # in a bucket
        remote = path.stat()
        return [remote.length, remote.mtime]


def _digest(path: Any) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_BYTES_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()
