"""Metrics of a run: a JSON line per record, and the same as TensorBoard events."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

__all__ = ["MetricWriter", "read_metrics"]

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

    def __init__(self, workdir: Path, *, step: int):
        self._file = self._events = None
        self._flushed = time.monotonic()
        if jax.process_index() != 0:
            return
        path = self._path = Path(workdir) / "metrics.jsonl"
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        rewritten = path.with_suffix(".rewritten")
        with _explained(path):
            rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
            rewritten.replace(path)
            self._file = path.open("a")
            events = Path(workdir) / "tensorboard" / "events"
            events.parent.mkdir(exist_ok=True)
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
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
            self._events.write_event(_event(step, summary=Summary(value=scalars)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        for sink in (self._file, self._events):
            if sink is not None:
                with _explained(self._path):
                    sink.close()


def read_metrics(workdir: Path) -> list[dict]:
    """The records of a run so far, oldest first; a line cut short by a crash is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _event(step: int, **what: object) -> Event:
    return Event(wall_time=time.time(), step=step, **what)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write metrics to {path} ({error.strerror}); when it can be written, the same "
            "command goes on from the last checkpoint",
        ) from error
