"""Write the metrics of a run as JSON lines and as TensorBoard events."""

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

_FLUSH_SECONDS = 30.0  # at most this long until TensorBoard events are written


class MetricWriter:
    """Append records to `metrics.jsonl` and to `tensorboard/`, in process 0 only.

    A resumed run first drops the lines after the step from which it resumes, so that no step is in
    the file twice. Names of measured times begin with `time/`, and names of figures of the compiled
    program with `machine/`. All other metrics are bitwise equal to those of an uninterrupted run.

    Args:
      workdir: the folder of the run.
      step: the step from which the run starts or resumes.

    Raises:
      OSError: if a file cannot be written, here or with a later record.
    """

    def __init__(self, workdir: AnyPath, *, step: int):
        self._file = self._events = None
        self._flushed = time.monotonic()
        if jax.process_index() != 0:
            return
        workdir = as_path(workdir)
        path = self._path = workdir / METRICS_FILE
        records, damaged = _read(path)
        kept_records = [record for record in records if record["step"] <= step]
        with _explained(path):
            if damaged:
                _set_aside(path, damaged)
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept_records))
            self._file = open_log(path)
            events = local_folder(workdir) / "tensorboard" / "events"
            events.parent.mkdir(parents=True, exist_ok=True)
            if is_remote(workdir):
                say(f"TensorBoard's events are written to {events.parent}")
            # `SummaryWriter` has a thread that ends if the disk is full, and then blocks others.
            self._events = EventsWriter(str(events))
            start = SessionLog(status=SessionLog.START)  # makes TensorBoard discard later steps
            self._events.write_event(_event(step + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a record, and flush it, so that it is not lost if the process is killed."""
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
        """Upload all records if the workdir is in an object store; otherwise do nothing."""
        if isinstance(self._file, RemoteLog):
            with _explained(self._path):
                self._file.upload()

    def close(self) -> None:
        """Write all remaining data, and close the files."""
        for sink in (self._file, self._events):
            if sink is not None:
                with _explained(self._path):
                    sink.close()


def read_metrics(workdir: AnyPath) -> list[dict]:
    """Read the records of a run, oldest first, without damaged lines."""
    return _read(as_path(workdir) / METRICS_FILE).records


def _read(path: AnyPath) -> JsonLines:
    """Read the records of a file that have a step; all other lines are damaged."""
    if not path.exists():
        return JsonLines([], [])
    lines = read_json_lines(path)
    valid = JsonLines([], lines.damaged)
    for record in lines.records:
        if isinstance(record.get("step"), int):
            valid.records.append(record)
        else:
            valid.damaged.append(json.dumps(record).encode())
    return valid


def _set_aside(path: AnyPath, damaged: Sequence[bytes]) -> None:
    """Append damaged lines to another file, and report their number."""
    damaged_file = path.with_suffix(".damaged")
    with open_log(damaged_file) as file:
        file.write(b"\n".join(damaged) + b"\n")
    say(f"moved {len(damaged)} damaged lines of {path} to {damaged_file.name}")


def _event(step: int, **content: object) -> Event:
    return Event(wall_time=time.time(), step=step, **content)


@contextlib.contextmanager
def _explained(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write metrics to {path} ({error.strerror}); when that is possible again, the "
            "same command resumes from the last checkpoint",
        ) from error
