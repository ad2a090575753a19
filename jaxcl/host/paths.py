"""Paths as users give them: local paths, and URLs of object stores, such as `gs://bucket/run`.

Uses only the standard library unless a URL is given, so that parsing flags stays fast.
"""

import os
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

__all__ = ["AnyPath", "as_path", "local_path"]

if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = PurePath
"""A `pathlib.Path` or an `etils.epath.Path`, which has the same methods but is not a subclass."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""The scheme of a URL; `pathlib` merges its two slashes. A single letter is a Windows drive."""

_MOUNT = (
    "mount the bucket, as launch/tpu_pod.sh does with gcsfuse, and give the path below its mount "
    "point"
)


def as_path(given: str | os.PathLike[str]) -> AnyPath:
    """The path of a file or folder, with `~` expanded to the home directory.

    Args:
      given: a local path, or a URL of an object store that `etils.epath` supports, if the package
        for its file system is installed (`gcsfs` for `gs://`).

    Raises:
      ValueError: for any other URL, or if the user of `~user` is unknown.
    """
    url = _SCHEME.match(os.fspath(given))
    if url is None:
        return local_path(given)
    import fsspec
    from etils import epath

    scheme = url[1]
    try:
        path = epath.Path(f"{scheme}://{os.fspath(given)[url.end() :].lstrip('/')}")
    except KeyError:  # etils has no file system for this scheme
        return local_path(given)
    try:
        protocol = fsspec.get_filesystem_class(scheme).protocol
    except ImportError as error:
        raise ValueError(f"{path} cannot be opened ({error}); do so, or {_MOUNT}") from error
    protocol = protocol if isinstance(protocol, str) else protocol[0]
    # Otherwise a process would not see the files that other processes have written since.
    fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # With TensorFlow installed, etils would use its file systems instead of fsspec's.
    os.environ.setdefault("EPATH_USE_TF", "false")
    return path


def local_path(given: str | os.PathLike[str]) -> Path:
    """The path of a local file or folder, with `~` expanded to the home directory.

    Raises:
      ValueError: for a URL, such as `gs://bucket/run`, or if the user of `~user` is unknown.
    """
    text = os.path.expanduser(os.fspath(given))
    if _SCHEME.match(text):
        raise ValueError(f"{text} is a URL, but a local path is needed; {_MOUNT}")
    if text.startswith("~"):
        raise ValueError(f"{text} names an unknown user; give the full path")
    return Path(text)
