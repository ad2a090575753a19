"""Lets the processes of one run find each other before JAX connects them.

JAX's coordinator accepts any process that connects to its port, and shares the port with other
coordinators on the same machine. So process 0 first reserves the port, and writes the port and a
new random token to the workdir, where only processes with the same workdir can read them. Those
processes connect, send the token, and wait until all of them are connected. Then JAX's coordinator
takes over the port.

This keeps runs apart. It does not protect the coordinator from other programs on the network
(`launch/README.md`).
"""

import contextlib
import json
import secrets
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxcl.host.files import is_remote, read_json_object, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.ports import guard_port, listen, split_address
from jaxcl.host.progress import say

__all__ = ["Meeting", "meet"]

INVITATION_FILE = ".meeting.json"
MEETING_SECONDS = 300
GRACE_SECONDS = 15
"""How long a process without the token may retry: its host may see the invitation late."""

_SECONDS_BETWEEN_TRIES = 0.5
_SECONDS_TO_ANSWER = 5
_MAX_BYTES = 65_536
_HINT = "start all processes of a run with the same --workdir, and each run with its own port"


class Meeting(NamedTuple):
    """The addresses of JAX's coordinator.

    Attributes:
      address: the address at which processes reach the coordinator.
      bind_address: the address at which the coordinator listens; `None` except in process 0.
    """

    address: str
    bind_address: str | None


@contextlib.contextmanager
def meet(
    workdir: AnyPath, coordinator: str, *, num_processes: int, process_id: int, bind: str | None
) -> Iterator[Meeting]:
    """Wait for all processes of the run, and reserve the port until the block ends.

    Args:
      workdir: the folder of the run, which all processes share; their paths to it may differ.
      coordinator: host and port of process 0; with port 0, process 0 chooses a free port.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      bind: host and port where process 0 listens; `None` to listen at `coordinator`.

    Raises:
      ValueError: if the port is in use, or a process does not connect or does not belong here.
    """
    host, port = split_address(coordinator)
    if process_id:
        introduction = {
            "process_id": process_id,
            "num_processes": num_processes,
            "workdir": _full_name(workdir),
        }
        yield Meeting(f"{host}:{_join(workdir, host, port, introduction)}", None)
        return
    with contextlib.closing(listen(coordinator, bind)) as listener:
        bound, bound_port, *_ = listener.getsockname()
        port = port or bound_port
        with _invitation(workdir, port) as token:
            _Reception(workdir, f"{host}:{port}", token, num_processes).receive(listener)
        guard = guard_port(listener)
    with guard:
        where = f"[{bound}]" if ":" in bound else bound
        yield Meeting(f"{host}:{port}", f"{where}:{bound_port}")


@contextlib.contextmanager
def _invitation(workdir: AnyPath, port: int) -> Iterator[str]:
    """Write a file for the other processes to the workdir, and remove it afterwards."""
    folders = () if is_remote(workdir) else (workdir, *workdir.parents)
    absent = [folder for folder in folders if not folder.exists()]
    path, token = workdir / INVITATION_FILE, secrets.token_hex()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"port": port, "token": token}))
        yield token
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            for folder in absent:
                folder.rmdir()


class _Reception:
    """Process 0's side of the meeting.

    Args:
      workdir: the folder of the run.
      address: the address of the coordinator.
      token: the proof that a process belongs to this start.
      num_processes: the number of processes, including this one.
    """

    def __init__(self, workdir: AnyPath, address: str, token: str, num_processes: int):
        self._workdir, self._address = _full_name(workdir), address
        self._token, self._num_processes = token, num_processes
        self._present: dict[int, socket.socket] = {}
        # Processes without the token, by number: the time of the first attempt, and their workdir.
        self._strangers: dict[int, tuple[float, str]] = {}

    def receive(self, listener: socket.socket) -> None:
        """Wait for the other processes, then release all of them."""
        deadline = time.monotonic() + MEETING_SECONDS
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while len(self._present) < self._num_processes - 1:
                self._check_missing(deadline)
                events = selector.select(timeout=1)
                # Ended processes first, because one of them may already be connecting again.
                for key, _ in sorted(events, key=lambda event: event[0].fileobj is listener):
                    if key.fileobj is not listener:  # readable: the peer closed it
                        selector.unregister(key.fileobj)
                        del self._present[key.data]
                        continue
                    connection = stack.enter_context(listener.accept()[0])
                    process_id = self._admit(connection)
                    if process_id is not None:
                        self._present[process_id] = connection
                        selector.register(connection, selectors.EVENT_READ, process_id)
            for connection in self._present.values():
                _send(connection, {"all": "present"})

    def _check_missing(self, deadline: float) -> None:
        now = time.monotonic()
        missing = [n for n in range(1, self._num_processes) if n not in self._present]
        for number in missing:
            first, workdir = self._strangers.get(number, (now, ""))
            if now - first > GRACE_SECONDS:
                raise ValueError(
                    f"process {number} was started with the workdir {workdir}, process 0 with "
                    f"{self._workdir}; {_HINT}"
                )
        if now > deadline:
            raise ValueError(
                f"of {self._num_processes} processes, {', '.join(map(str, missing))} did not "
                f"connect within {MEETING_SECONDS} s; {_HINT}"
            )

    def _admit(self, connection: socket.socket) -> int | None:
        """Return the number of a process of this run; tell other processes why they are refused."""
        connection.settimeout(_SECONDS_TO_ANSWER)
        request = _read(connection)
        number, num_processes = request.get("process_id"), request.get("num_processes")
        if request.get("token") != self._token:
            if isinstance(number, int) and num_processes == self._num_processes:
                attempt = time.monotonic(), str(request.get("workdir"))
                self._strangers.setdefault(number, attempt)
            answer = {"stranger": f"{self._address} belongs to the run in {self._workdir}"}
        elif num_processes != self._num_processes:
            expected = f"process 0 is one of {self._num_processes} processes"
            answer = {"problem": f"{expected}, process {number} one of {num_processes}"}
        elif number in self._present:
            answer = {"problem": f"there are two processes with number {number}"}
        else:
            _send(connection, {"welcome": number})
            return number
        if "problem" in answer:
            say(f"a process was refused: {answer['problem']}")
        _send(connection, answer)
        connection.close()
        return None


def _join(workdir: AnyPath, host: str, port: int, introduction: Mapping[str, Any]) -> int:
    """Find process 0 of the run; return the coordinator's port once all processes are connected."""
    deadline = time.monotonic() + MEETING_SECONDS
    refusal = None
    reason = "there is no invitation"
    while (now := time.monotonic()) < deadline:
        invitation = _read_invitation(workdir)
        # Without an invitation, process 0 can still say what its workdir is.
        asked_port = invitation.get("port", port)
        if asked_port and port in (0, asked_port):
            request = {**introduction, "token": invitation.get("token")}
            answer = _ask((host.strip("[]"), asked_port), request, deadline - now)
            if "all" in answer:
                return asked_port
            if "problem" in answer:
                raise ValueError(f"{answer['problem']}; give each process its own number")
            reason = answer.get("unreachable", reason)
            if "stranger" in answer and refusal is None:
                refusal = now, answer["stranger"]
            if refusal is not None and now - refusal[0] > GRACE_SECONDS:
                own = introduction["workdir"]
                raise ValueError(f"{refusal[1]}, not to the run in {own}; {_HINT}")
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise ValueError(
        f"process 0 did not appear in {workdir} within {MEETING_SECONDS} s ({reason}); {_HINT}"
    )


def _ask(address: tuple[str, int], introduction: Mapping[str, Any], seconds: float) -> Mapping:
    """Ask process 0 for admission; return its last answer, which comes once all are connected."""
    where = "{}:{}".format(*address)
    try:
        with socket.create_connection(address, timeout=seconds) as server:
            server.settimeout(_SECONDS_TO_ANSWER)
            _send(server, introduction)
            answer = _read(server)
            if "welcome" in answer:
                server.settimeout(seconds + _SECONDS_TO_ANSWER)  # process 0 gives up first
                answer = _read(server) or {"unreachable": "it has ended"}
    except OSError as error:
        return {"unreachable": f"{where}: {error}"}
    return answer or {"stranger": f"{where} belongs to another run or program"}


def _read_invitation(workdir: AnyPath) -> dict[str, Any]:
    """Read the invitation; an empty dict if there is none."""
    try:
        next(workdir.iterdir(), None)  # makes NFS check again for a file that was absent
        invitation = read_json_object(workdir / INVITATION_FILE)
    except (OSError, ValueError):
        return {}
    return invitation if isinstance(invitation.get("port"), int) else {}


def _full_name(workdir: AnyPath) -> str:
    return str(workdir if is_remote(workdir) else workdir.absolute())


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other process has ended
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict[str, Any]:
    """Read a one-line message; an empty dict if there is none."""
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < _MAX_BYTES:
            part = connection.recv(1)
            if not part:
                break
            received += part
        message = json.loads(received)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
