"""Paths as users give them.

Needs the standard library only, as parsers of flags do.
"""

import os
import re
from pathlib import Path

__all__ = ["local_path"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""Of a URL. `pathlib` makes one slash of the two. A single letter is a drive of Windows."""


def local_path(given: str | os.PathLike[str]) -> Path:
    """The path of a local file or folder, with `~` expanded to the home directory.

    Raises:
      ValueError: for a URL, such as `gs://bucket/run`, or if the user of `~user` is unknown.
    """
    text = os.path.expanduser(os.fspath(given))
    if _SCHEME.match(text):
        raise ValueError(
            f"{text} is a URL, but a local path is wanted; mount the bucket, as launch/tpu_pod.sh "
            "does with gcsfuse, and give the path below its mount point"
        )
    if text.startswith("~"):
        raise ValueError(f"{text} names an unknown user; give the full path")
    return Path(text)
