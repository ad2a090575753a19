"""The user's folders: home, caches, and folders that no other user can change."""

import os
import stat
import tempfile
from pathlib import Path

from jaxcl.host.paths import local_path
from jaxcl.host.progress import say

__all__ = ["cache_folder", "ensure_home", "make_private", "shared_folder"]


def ensure_home() -> None:
    """Set `HOME` to a temporary folder for a user without a home directory.

    In a container, the user may be just a number, without `HOME` and without an entry in
    `/etc/passwd`. Then this program and its libraries cannot expand `~`, or it expands to `/`,
    which container runtimes use as a fallback.
    """
    expanded = os.path.expanduser("~")
    if expanded != "~" and (expanded != "/" or os.access("/", os.W_OK)):
        return
    home = Path(tempfile.gettempdir()) / f"jaxcl-home-{os.getuid()}"
    try:
        make_private(home)
    except OSError:
        home = Path(tempfile.mkdtemp(prefix="jaxcl-home-"))
    os.environ["HOME"] = str(home)
    say(f"warning: this user has no home directory; using {home} instead, unless you set HOME")


def cache_folder() -> Path:
    """The folder for jaxcl's caches: in `XDG_CACHE_HOME` or `~/.cache`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "jaxcl"


def shared_folder(named: str | None) -> Path:
    """The folder for data that runs share: the named folder, or the user's cache."""
    return cache_folder() if named is None else local_path(named)


def make_private(folder: Path) -> None:
    """Create a folder that no other user can write to or replace, or check an existing one.

    Raises:
      PermissionError: if another user owns or can change the folder or one of its parents.
      OSError: if the folder cannot be created.
    """
    for parent in reversed([folder, *folder.parents]):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)
    if not hasattr(os, "getuid"):  # Windows keeps users' folders apart
        return
    resolved = folder.resolve(strict=True)
    if not resolved.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    _check_owner(resolved.lstat(), resolved, own=True)
    for parent in resolved.parents:
        _check_owner(parent.lstat(), parent, own=False)


def _check_owner(status: os.stat_result, path: Path, *, own: bool) -> None:
    allowed = {os.getuid()} if own else {os.getuid(), 0}
    if status.st_uid not in allowed:
        raise PermissionError(f"{path} belongs to another user")
    # In a parent with the sticky bit, such as /tmp, others cannot replace this user's folders.
    sticky = not own and status.st_mode & stat.S_ISVTX
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise PermissionError(f"other users can write to {path}; forbid it with chmod go-w")
