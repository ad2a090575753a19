"""A lock on an object store: a file that its holder renews until it ends.

Object stores have no locks that end with a process, so the holder rewrites the file every 15
seconds. If the file does not change for two minutes, its holder has been killed, and another
process may take over the lease. If several processes try, the one that creates the takeover file
gets the lease.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator

from jaxcl.host.files import read_regular, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import say
from jaxcl.host.remote import create_file

__all__ = ["leased"]

RENEWAL_SECONDS = 15.0
EXPIRY_SECONDS = 120.0

_MAX_BYTES = 1024


@contextlib.contextmanager
def leased(path: AnyPath) -> Iterator[None]:
    """Hold the lease of a remote file.

    Args:
      path: the lease file.

    Raises:
      ValueError: if another process holds the lease.
    """
    holder = secrets.token_hex(8)
    try:
        create_file(path, _content(holder, 0))
    except FileExistsError:
        say(f"{path} exists; waiting {EXPIRY_SECONDS:.0f} s to see if another run renews it")
        _take_over(path, holder)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, holder, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(OSError):
            if _holder(path) == holder:
                path.unlink()


def _take_over(path: AnyPath, holder: str) -> None:
    """Take over a lease file if its holder does not renew it."""
    abandoned = _read(path)
    deadline = time.monotonic() + EXPIRY_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(RENEWAL_SECONDS, EXPIRY_SECONDS / 4))
        if _read(path) != abandoned:
            raise _held(path)
    takeover = path.with_name(f"{path.name}.takeover")
    try:
        create_file(takeover, holder.encode())
    except FileExistsError as error:
        raise _held(path, f" (if not, remove {takeover})") from error
    try:
        if _read(path) != abandoned:  # another process has finished a takeover
            raise _held(path)
        write_whole(path, _content(holder, 0))
    finally:
        takeover.unlink(missing_ok=True)


def _renew(path: AnyPath, holder: str, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(RENEWAL_SECONDS):
        number += 1
        try:
            current = _holder(path)
            if current == holder:
                write_whole(path, _content(holder, number))
            elif current:
                say(f"warning: another process has taken over {path}; stop one of the two")
                return
        except Exception as error:  # each store has its own error classes
            say(f"warning: cannot renew {path} ({error}); another run may take the folder")


def _held(path: AnyPath, hint: str = "") -> ValueError:
    return ValueError(
        f"another run is at work in {path.parent}{hint}; wait until it ends, or choose another "
        "--workdir"
    )


def _content(holder: str, number: int) -> bytes:
    return f"{holder} {number}\n".encode()


def _holder(path: AnyPath) -> str:
    return _read(path).decode().partition(" ")[0]


def _read(path: AnyPath) -> bytes:
    try:
        return read_regular(path, limit=_MAX_BYTES)
    except FileNotFoundError:
        return b""
