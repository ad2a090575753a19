"""Several processes as one run: they start, take turns, fail and stop together.

Each process runs the same program on its own devices. JAX's coordination service, which process 0
hosts, connects them and notices when one is gone. With a single process, the functions here only
call the function that they are given.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.host.meeting import meet
from jaxcl.host.output import print_traceback
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import say

__all__ = [
    "HEARTBEAT_SECONDS",
    "PEER_LOST",
    "PeerError",
    "StopRequests",
    "Stopped",
    "catch_interrupt",
    "first_of_all",
    "first_then_others",
    "leave",
    "leave_for",
    "of_full_devices",
    "of_lost_process",
    "start_processes",
    "stop_requests",
    "together",
]

HEARTBEAT_SECONDS = 30
"""How long a process that is stuck or whose host is gone may be silent until the others end.

A killed process is noticed earlier, at the next exchange of data with it."""

PEER_LOST = 75
"""The exit code if another process was lost: "try again" (EX_TEMPFAIL)."""

# JAX's errors for faults that also occur in a single process.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")

# Environment variables with the number of processes, or with the names of their hosts.
_COUNTS = {"Slurm": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
_HOSTS = {"TPU": "TPU_WORKER_HOSTNAMES"}

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process of the run has failed."""


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped at step {step}; the same command resumes from there")
        self.exit_code = 128 + signal_number


def start_processes(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    asked: bool = False,
    workdir: AnyPath | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Join the other processes of a run, if there are any; call it before JAX does anything else.

    The other processes are known from the arguments; from the variables `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; or from the variables that Slurm, Open MPI or
    Kubernetes on TPUs sets. With `asked`, JAX detects the cluster itself, as on a TPU pod.

    Args:
      coordinator: host and port of process 0, which listens there; port 0 means any free port.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      asked: whether to let JAX detect the cluster if the processes are not known otherwise.
      workdir: the run's folder. With a coordinator, the processes first exchange a token through
        it, which keeps processes of other runs out.
      environment: the environment variables.

    Raises:
      ValueError: if only some of the first three arguments are given, the port is in use, or the
        processes cannot connect.
    """
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None:
        num_processes = _number(environment, "JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _number(environment, "JAX_PROCESS_ID")
    description = f"{coordinator=}, {num_processes=}, {process_id=}"
    known = [value is not None for value in (coordinator, num_processes, process_id)]
    cluster = _cluster(environment)
    if not all(known) and cluster is None and not asked:
        if any(known):
            raise ValueError(f"{description}: several processes need all three")
        return
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(f"{process_id=} of {num_processes=}; processes are numbered from 0")
    others = "the other processes" if num_processes is None else f"{num_processes - 1} more"
    if process_id in (0, None):
        say(f"waiting up to five minutes for {others}")
    if coordinator is None or num_processes is None or process_id is None or workdir is None:
        _initialize(coordinator, num_processes, process_id, where=cluster or description)
        return
    bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS")
    with meet(
        workdir, coordinator, num_processes=num_processes, process_id=process_id, bind=bind
    ) as (address, bind_address):
        _initialize(address, num_processes, process_id, bind_address, where=description)


def _initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    bind_address: str | None = None,
    *,
    where: str,
) -> None:
    """Connect JAX's processes; SIGHUP then acts like SIGTERM until `stop_requests` takes over."""
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=bind_address,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # of any class: from the cluster, the connection or JAX
        raise ValueError(
            f"the processes of the run cannot connect to each other ({where}): "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    for number in _hangup():
        signal.signal(number, _send_sigterm)


def together(make: Callable[[], T]) -> T:
    """Call `make` in every process; if it fails in one of them, fail in all.

    Otherwise, the other processes would wait for the failed one forever.

    Raises:
      PeerError: if another process failed; the failed process raises its own error.
    """
    if jax.process_count() == 1:
        return make()
    result = error = None
    try:
        result = make()
    except Exception as raised:  # raised again once all processes know of it
        error = raised
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise PeerError(f"process {int(np.argmax(failed))} has failed; its own output says why")
    return result  # type: ignore[return-value] # set if there was no error


def first_of_all(numbers: Sequence[int]) -> list[int]:
    """Broadcast the numbers of process 0 to all processes."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.array(len(numbers))))
    padded = np.resize(np.array([*numbers, 0], np.int32), count + 1)
    return multihost_utils.broadcast_one_to_all(padded).tolist()[:count]


def first_then_others(make: Callable[[], T]) -> T:
    """Call `make` in process 0 first, and then in all other processes.

    On a shared disk, the others find the files that process 0 wrote; otherwise, each process writes
    its own files.

    Raises:
      PeerError: if another process failed.
    """
    if jax.process_count() == 1:
        return make()
    first = jax.process_index() == 0
    of_first = together(lambda: make() if first else None)
    of_others = together(lambda: None if first else make())
    return of_first if first else of_others  # type: ignore[return-value] # not the `None`


def of_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process is gone, not that this process is at fault."""
    if isinstance(error, PeerError):
        return True
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    own = any(fault in str(error) for fault in _OWN_FAULTS)
    return jax.process_count() > 1 and of_jax and not own


def of_full_devices(error: BaseException) -> bool:
    """Whether an error means that the devices are out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def leave_for(error: Exception, *, verbose: bool = False) -> NoReturn:
    """End this process because of an error, without waiting for other processes of the run.

    Args:
      error: any error that is not a user's mistake.
      verbose: whether to print tracebacks of errors that are otherwise reported in one line.
    """
    if verbose and (of_full_devices(error) or of_lost_process(error)):
        print_traceback(error)
    reason = " ".join(str(error).split())[:200]
    if of_full_devices(error):
        say(
            f"error: out of device memory ({reason}); python -m jaxcl.plan shows what uses it; "
            "use a smaller global_batch_size or grad_cache.chunk_size, or more devices"
        )
        leave(1)
    if jax.process_count() == 1:
        raise error
    if of_lost_process(error):
        say(
            f"error: process {jax.process_index()} cannot continue without another one ({reason}); "
            "start all of them again: the same command resumes from the last checkpoint"
        )
        leave(PEER_LOST)
    print_traceback(error)
    leave(1)


def leave(exit_code: int, *, at_once: bool = False) -> NoReturn:
    """End this process without waiting for other processes of the run, which may be stuck.

    Args:
      exit_code: the exit code.
      at_once: whether to skip Python's shutdown, which can crash while JAX still computes.
    """
    if not at_once and jax.process_count() == 1:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


StopRequests = Callable[[int], int | None]
"""`step -> signal number`, or `None` to continue after that step; the same in all processes."""


_interrupted: list[int] = []  # SIGINT, once the first Ctrl-C has come


def catch_interrupt() -> None:
    """Make the first Ctrl-C a `KeyboardInterrupt`, and let the second end the process at once."""

    def interrupt(number: int, _: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _interrupted.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turn SIGTERM, SIGINT and SIGHUP into a stop after the same step in every process.

    With a single process, a second signal takes effect at once. With several processes, a signal to
    one of them stops all: JAX listens for SIGTERM and chooses the step, and the other signals are
    passed on as SIGTERM. SIGHUP stays ignored if it was ignored at the start, as under `nohup`.
    Python lets only the main thread handle signals; in another thread, the handlers do not change.

    Raises:
      KeyboardInterrupt: if Ctrl-C came earlier and was lost in a callback, where Python drops it.
    """
    if _interrupted:
        raise KeyboardInterrupt
    several = jax.process_count() > 1
    received: list[int] = []
    caught = [signal.SIGINT, *_hangup()] if several else [signal.SIGTERM, signal.SIGINT, *_hangup()]
    if threading.current_thread() is not threading.main_thread():
        caught = []
    before = {number: signal.getsignal(number) for number in caught}

    def note(number: int, _: object) -> None:
        received.append(number)
        say(f"{signal.Signals(number).name} received: saving, then stopping")
        for other, handler in before.items():
            signal.signal(other, handler)
        if several:
            _send_sigterm()

    def asked(step: int) -> int | None:
        if not several:
            return received[0] if received else None
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    for number in caught:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hangup() -> list[signal.Signals]:
    """SIGHUP, where it exists and is not ignored."""
    number = getattr(signal, "SIGHUP", None)
    return [] if number is None or signal.getsignal(number) is signal.SIG_IGN else [number]


def _send_sigterm(*_: object) -> None:
    """Send this process SIGTERM, which makes JAX stop all processes together."""
    os.kill(os.getpid(), signal.SIGTERM)


def _cluster(environment: Mapping[str, str]) -> str | None:
    """The kind of cluster that started this process as one of several, or `None`."""
    for name, variable in _COUNTS.items():
        if (_number(environment, variable) or 1) > 1:
            return name
    for name, variable in _HOSTS.items():
        if re.fullmatch(r"[\w.:-]+(,[\w.:-]+)+", environment.get(variable, "")):
            return name
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdigit():
        raise ValueError(f"{name}={value!r}; it must be a number")
    return int(value)
