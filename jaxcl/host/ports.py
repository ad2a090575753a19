"""Reserves the port of JAX's coordinator for one program."""

import contextlib
import ipaddress
import socket
from typing import Any

from jaxcl.host.progress import say

__all__ = ["guard_port", "listen", "split_address"]


def split_address(address: str) -> tuple[str, int]:
    """Split `HOST:PORT` into host and port.

    Raises:
      ValueError: if the text is anything else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError(f"coordinator={address!r} is not HOST:PORT, such as 10.0.0.1:1234")
    return host, int(port)


def listen(coordinator: str, bind: str | None = None) -> socket.socket:
    """Listen at an address of this machine where no other program listens.

    Args:
      coordinator: the host and port of the coordinator.
      bind: host and port to listen at instead of `coordinator`.

    Raises:
      ValueError: if the port is in use, or the address is not one of this machine.
    """
    host, port = split_address(bind or coordinator)
    try:
        address = str(socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ValueError(f"the coordinator's host {host!r} is unknown here ({error})") from error
    if bind is None and _is_name_of_loopback(host, address):
        say(
            f"warning: {host} is {address} here, which other machines cannot reach; the "
            "coordinator listens on all networks, unless JAX_COORDINATOR_BIND_ADDRESS names one"
        )
        address = "0.0.0.0"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of an earlier run that are still closing do not matter.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(
            f"process 0 cannot listen at {host}:{port} ({error.strerror}); give an address of its "
            "machine with a port that no other run uses, or set JAX_COORDINATOR_BIND_ADDRESS"
        ) from error
    return listener


def guard_port(listener: socket.socket) -> contextlib.AbstractContextManager[Any]:
    """Keep a listener's port reserved after the listener is closed, until the block ends.

    JAX's coordinator sets `SO_REUSEPORT`, and so does the guard, so both can bind the port, which
    programs without this option cannot. On systems without it, the port is free for a moment.
    """
    guard = socket.socket(listener.family, socket.SOCK_STREAM)
    try:
        for each in (listener, guard):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        guard.bind(listener.getsockname()[:2])
    except (AttributeError, OSError):
        guard.close()
        return contextlib.nullcontext()
    return guard


def _is_name_of_loopback(host: str, address: str) -> bool:
    """Whether a host name resolves to loopback, as on systems that map their own name to it."""
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return loopback and host.strip("[]") not in (address, "localhost")
