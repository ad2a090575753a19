"""Runs one job in separate processes, within its time limit, and reads results as they arrive."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Outcome", "run_job"]

_POLL_SECONDS = 0.1
_MOST_PROCESSES = 8

Event = dict[str, Any]


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
      status: "complete", "cut short" at its time limit, or "failed".
      seconds: how long the job took.
      log: the output of the job's processes.
    """

    status: str
    seconds: float
    log: str


class _Progress:
    """The reports of the current process, and its current measurement."""

    def __init__(self, path: Path, on_event: Callable[[Event], None]):
        self.done: list[str] = []
        self.current: str | None = None
        self.since = time.monotonic()
        self._path, self._on_event, self._read = path, on_event, 0

    def read(self) -> None:
        """Pass on all complete lines."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        complete_text = text[: text.rfind(b"\n") + 1]
        self._read += len(complete_text)
        for line in complete_text.splitlines():
            event = json.loads(line)
            if event["event"] == "begin":
                self.current, self.since = event["name"], time.monotonic()
                continue
            if event["event"] in ("result", "failure"):
                self.current = None
                self.done.append(event["name"])
            self._on_event(event)

    def blame(self, kind: str, error: str) -> bool:
        """Record the process's end as a failure of its measurement; `False` if none was running."""
        if self.current is None:
            return False
        self._on_event({"event": "failure", "name": self.current, "kind": kind, "error": error})
        self.done.append(self.current)
        self.current = None
        return True


def run_job(
    command: Sequence[str],
    spec: Mapping[str, Any],
    directory: Path,
    *,
    seconds: float,
    measurement_seconds: float,
    environment: Mapping[str, str],
    on_event: Callable[[Event], None],
) -> Outcome:
    """Run a job until its end or its time limit.

    If a process dies or hangs, only its current measurement is lost: a new process continues with
    the other measurements, as long as there is time.

    Args:
      command: the command of a process, which reads `spec` from `directory / "spec.json"`.
      spec: the request to the process; `results`, `seconds` and `done` are added.
      directory: the folder for the job's files.
      seconds: the time limit of the job.
      measurement_seconds: the time limit of a single measurement.
      environment: the environment of the processes.
      on_event: called with each result, failure and skip.
    """
    start = time.monotonic()
    log, results = directory / "log.txt", directory / "results.jsonl"
    progress = _Progress(results, on_event)
    for _ in range(_MOST_PROCESSES):
        left = seconds - (time.monotonic() - start)
        asked = {**spec, "results": str(results), "seconds": left, "done": progress.done}
        (directory / "spec.json").write_text(json.dumps(asked))
        before, finished = log.stat().st_size if log.exists() else 0, len(progress.done)
        with log.open("ab") as output, _group(command, environment, output) as process:
            ending = _watch(process, progress, start + seconds, measurement_seconds)
        progress.read()
        if ending in ("complete", "cut short"):
            if ending == "cut short":
                progress.blame("time", f"the job's {seconds:.0f} s were over")
            break
        text = log.read_bytes()[before:].decode(errors="replace")
        blamed = progress.blame("process", f"{ending}\n{text}")
        if not blamed and len(progress.done) == finished:  # it would only fail there again
            ending = "failed"
            break
    else:
        ending = "failed"
    text = log.read_text(errors="replace")
    return Outcome(ending, time.monotonic() - start, text)


def _watch(
    process: subprocess.Popen, progress: _Progress, deadline: float, measurement_seconds: float
) -> str:
    """Wait for the process, and return how it ended."""
    progress.since = time.monotonic()
    while True:
        status = process.poll()
        progress.read()
        now = time.monotonic()
        if status is not None:
            return "complete" if status == 0 else f"the process {_ended(status)}"
        if now > deadline:
            return "cut short"
        if progress.current is not None and now - progress.since > measurement_seconds:
            return f"killed: no result after {measurement_seconds:.0f} s"
        time.sleep(_POLL_SECONDS)


def _ended(status: int) -> str:
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


@contextlib.contextmanager
def _group(
    command: Sequence[str], environment: Mapping[str, str], output: Any
) -> Iterator[subprocess.Popen]:
    """A process in a new process group; the whole group is killed on leaving the context."""
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
