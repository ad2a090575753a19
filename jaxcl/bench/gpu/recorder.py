"""Writes the results of one process, one JSON line each, for the parent to read.

Standard library only: the PyTorch scripts of this folder import it as well.
"""

import json
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

__all__ = ["CheckFailed", "DeviceLost", "NotHere", "Recorder"]


class CheckFailed(Exception):
    """A result differs too much from its reference, so that its time is meaningless."""


class NotHere(Exception):
    """This machine cannot run the measurement, which is not a failure."""


class DeviceLost(Exception):
    """The device no longer responds; only a new process can use it again."""


class Recorder:
    """Runs measurements one after the other, and writes each result before the next starts.

    A measurement is a function that returns a JSON dictionary. If one raises, the others still run.

    Args:
      path: the file of JSON lines that the parent reads.
      seconds: the time limit of this process.
      done: names of measurements that an earlier process of this job has finished or died in.
      is_alive: checks after a failure whether the device still works.
      out_of_memory: texts in the messages of errors that mean that a measurement did not fit.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        seconds: float,
        done: Collection[str] = (),
        is_alive: Callable[[], bool] = lambda: True,
        out_of_memory: tuple[str, ...] = ("RESOURCE_EXHAUSTED", "OutOfMemoryError"),
    ):
        self._path = Path(path)
        self._deadline = time.monotonic() + seconds
        self._done = set(done)
        self._is_alive = is_alive
        self._out_of_memory = out_of_memory

    def remaining(self) -> float:
        """Seconds until this process must end."""
        return self._deadline - time.monotonic()

    def measure(self, name: str, measurement: Callable[[], Mapping[str, Any]]) -> None:
        """Run one measurement, or record why it is skipped.

        Raises:
          DeviceLost: if the device does not survive the measurement.
        """
        if name in self._done:
            return
        if self.remaining() <= 0:
            self.write(event="skip", name=name, why="no time left")
            return
        self.write(event="begin", name=name)
        try:
            self.write(event="result", name=name, **measurement())
        except NotHere as error:
            self.write(event="skip", name=name, why=str(error))
        except Exception as error:  # whatever it is, the next measurement does not depend on it
            text = traceback.format_exc()
            self.write(event="failure", name=name, kind=self._kind(error, text), error=text)
            if not self._is_alive():
                raise DeviceLost(name) from error

    def write(self, **event: Any) -> None:
        """Append a line to the file."""
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def _kind(self, error: Exception, text: str) -> str:
        if isinstance(error, CheckFailed):
            return "check"
        return "memory" if any(sign in text for sign in self._out_of_memory) else "error"
