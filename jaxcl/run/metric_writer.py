"""Metrics of a run: a JSON line per record, and the same as TensorBoard events."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxcl.host.files import JsonLines, is_remote, read_json_lines, write_whole
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.progress import say
from jaxcl.host.remote import RemoteLog, local_folder, open_log

__all__ = ["METRICS_FILE", "MetricWriter", "read_metrics"]

METRICS_FILE = "metrics.jsonl"

_FLUSH_SECONDS = 30.0  # how old the newest event of TensorBoard may be


class MetricWriter:
    """Appends records to `metrics.jsonl` and to `tensorboard/`, from the first process only.

    A resumed run first drops the lines behind the step that it resumes from, so that the file
    never tells a step twice. Figures of the clock begin with `time/`, of the compiled program with
    `machine/`; all others are those of an uninterrupted run, to the last bit.

    Args:
      workdir: where the files are.
      step: the step that the run begins or resumes at.

    Raises:
      OSError: if they cannot be written, here and at each record.
    """

    def __init__(self, workdir: AnyPath, *, step: int):
        self._file = self._events = None
        self._flushed = time.monotonic()
        if jax.process_index() != 0:
            return
        workdir = as_path(workdir)
        path = self._path = workdir / METRICS_FILE
        records, damaged = _read(path)
        kept = [record for record in records if record["step"] <= step]
        with _explained(path):
            if damaged:
                _set_aside(path, damaged)
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = open_log(path)
            events = local_folder(workdir) / "tensorboard" / "events"
            events.parent.mkdir(parents=True, exist_ok=True)
            if is_remote(workdir):
                say(f"TensorBoard's events are written to {events.parent}")
            # Its `SummaryWriter` has a thread, which dies of a full disk and lets others wait.
            self._events = EventsWriter(str(events))
            begins = SessionLog(status=SessionLog.START)  # what was told of later steps is void
            self._events.write_event(_event(step + 1, session_log=begins))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one record and hands it to the system, so that a killed process loses none."""
        if self._file is None or self._events is None:
            return
        scalars = [
            Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()
        ]
        with _explained(self._path):
            self._file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
            self._file.flush()
            self._events.write_event(_event(step, summary=Summary(value=scalars)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    def upload(self) -> None:
        """Uploads all records to an object store; to a disk they are written one by one."""
        if isinstance(self._file, RemoteLog):
            with _explained(self._path):
                self._file.upload()

    def close(self) -> None:
        """Writes what is left."""
        for sink in (self._file, self._events):
            if sink is not None:
                with _explained(self._path):
                    sink.close()


def read_metrics(workdir: AnyPath) -> list[dict]:
    """The records of a run so far, oldest first; damaged lines are left out."""
    return _read(as_path(workdir) / METRICS_FILE).records


def _read(path: AnyPath) -> JsonLines:
    """The records of a file that have a step; all other lines are damaged."""
    if not path.exists():
        return JsonLines([], [])
    lines = read_json_lines(path)
    of_steps = JsonLines([], lines.damaged)
    for record in lines.records:
        if isinstance(record.get("step"), int):
            of_steps.records.append(record)
        else:
            of_steps.damaged.append(json.dumps(record).encode())
    return of_steps


def _set_aside(path: AnyPath, damaged: Sequence[bytes]) -> None:
    """Keeps damaged lines in another file, and says how many."""
    shelf = path.with_suffix(".damaged")
    with open_log(shelf) as file:
        file.write(b"\n".join(damaged) + b"\n")
    say(f"{len(damaged)} damaged lines of {path} are set aside in {shelf.name}")


def _event(step: int, **what: object) -> Event:
    return Event(wall_time=time.time(), step=step, **what)


@contextlib.contextmanager
def _explained(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write metrics to {path} ({error.strerror}); when it can be written, the same "
            "command goes on from the last checkpoint",
        ) from error
