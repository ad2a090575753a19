"""Standard output and standard error that never stop a run.

A log whose reader is gone, a full disk or a locale without the characters to print costs the
lines that cannot be written, and nothing else.
"""

import os
import sys
import traceback
from typing import Any

from jaxcl.host.printable import printable

__all__ = ["LossyStream", "check_output", "print_traceback", "protect_output"]


# ValueError: the stream is closed. RuntimeError: a signal's handler prints amid another print.
_NOT_WRITTEN = (OSError, ValueError, RuntimeError)


class LossyStream:
    """A text stream that drops text where writing fails.

    Args:
      stream: a text stream, where the text goes.

    Attributes:
      error: why text was dropped last; `None` if all was written.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write a text, with escapes for characters that the encoding lacks."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except _NOT_WRITTEN as error:
            self.error = error
        return len(text)

    def flush(self) -> None:
        """Write the buffered text."""
        try:
            self._stream.flush()
        except _NOT_WRITTEN as error:
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_output() -> None:
    """Keep this process's output from stopping it, and control characters out of tracebacks."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # It was closed before the start. The null device takes its number, which otherwise the
            # next file would get, and with it whatever libraries print.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))
    sys.excepthook = lambda _, error, __: print_traceback(error)


def check_output() -> None:
    """Flush standard output, for a command whose results are nowhere else.

    Raises:
      SystemExit: without an error, if its reader has gone, as after `| head -1`.
      OSError: if it did not take everything.
    """
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, LossyStream) else None
    if isinstance(error, BrokenPipeError):
        sys.exit(0)
    if error is not None:
        raise OSError(f"cannot write to standard output ({error})") from error


def print_traceback(error: BaseException) -> None:
    """Print an error with its traceback on standard error, control characters escaped."""
    LossyStream(sys.stderr).write(printable("".join(traceback.format_exception(error))))
