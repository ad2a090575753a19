"""Standard output and standard error that never stop a run.

If the reader of a log is gone, the disk is full, or the locale lacks a character, only the lines
that cannot be written are lost.
"""

import os
import sys
import traceback
from typing import Any

from jaxcl.host.printable import printable

__all__ = ["LossyStream", "check_output", "print_traceback", "protect_output"]


# ValueError: the stream is closed. RuntimeError: a signal handler prints during another print.
_NOT_WRITTEN = (OSError, ValueError, RuntimeError)


class LossyStream:
    """A text stream that drops text if writing fails.

    Args:
      stream: the text stream to write to.

    Attributes:
      error: the last error that made the stream drop text; `None` if all text was written.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write text, escaping characters that the encoding lacks."""
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
    """Ignore errors in writing output, and escape control characters in tracebacks."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Closed before the start. The null device takes the stream's file descriptor; otherwise
            # the next file to be opened would, and libraries would print into that file.
            # The stream stays open as long as the process.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))
    sys.excepthook = lambda _, error, __: print_traceback(error)


def check_output() -> None:
    """Flush standard output, for a command that writes its results nowhere else.

    Raises:
      SystemExit: with code 0, if the output's reader is gone, as after `| head -1`.
      OSError: if some output could not be written.
    """
    sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, LossyStream) else None
    if isinstance(error, BrokenPipeError):
        sys.exit(0)
    if error is not None:
        raise OSError(f"cannot write to standard output ({error})") from error


def print_traceback(error: BaseException) -> None:
    """Print an error with its traceback on standard error, and escape control characters."""
    LossyStream(sys.stderr).write(printable("".join(traceback.format_exception(error))))
