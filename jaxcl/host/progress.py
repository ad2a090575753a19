"""Shows progress on standard error: a bar on a terminal, otherwise a line every ten seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxcl.host.output import LossyStream
from jaxcl.host.printable import printable

__all__ = ["progress_bar", "say", "show"]

_SECONDS_BETWEEN_LINES = 10.0

_with_bars: list[Console] = []  # one per bar, the innermost last; prints above its bar


def say(text: str) -> None:
    """Print a line on standard error, with this process's number if there are several processes."""
    if jax.distributed.is_initialized():
        text = f"[{jax.process_index()}] {text}"
    console = _with_bars[-1] if _with_bars else _console()
    console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table on standard output, even if that is closed."""
    stream: Any = None if sys.stdout is None else LossyStream(sys.stdout)
    Console(file=stream).print(table)


@contextlib.contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show the progress of some work, in process 0 only.

    Args:
      what: the work, in a few words.
      total: the amount of work; `None` if it is not known.

    Yields:
      `advance(done=1, note="")`, which adds `done` to the progress and prints a note after the bar.
    """
    console = _console()
    if jax.distributed.is_initialized() and jax.process_index():
        yield lambda done=1, note="": None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(printable(what), total=total, note="")
            _with_bars.append(console)

            def advance(done: int = 1, note: str = "") -> None:
                progress.update(task, advance=done, note=printable(note))

            try:
                yield advance
            finally:
                _with_bars.remove(console)
    else:
        yield _line_printer(what, total)


def _line_printer(what: str, total: int | None) -> Callable[..., None]:
    start = last = time.monotonic()
    count = 0
    # Time and count at the first line; work before it included compilation or an earlier run.
    first: tuple[float, int] | None = None

    def advance(done: int = 1, note: str = "") -> None:
        nonlocal count, last, first
        count += done
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and count != total:
            return
        last = now
        seconds = f"{now - start:.0f} s"
        if total is None:
            parts = [f"{what}: {count:,}", note, seconds]
        else:
            if first is not None and first[1] < count < total:
                left = (now - first[0]) * (total - count) / (count - first[1])
                seconds += f", {left:.0f} s left"
            parts = [f"{what}: {count:,}/{total:,}", note, seconds]
        first = first or (now, count)
        say(" ".join(filter(None, parts)))

    return advance


def _console() -> Console:
    # Standard output is for results. A bar swaps standard error for a proxy.
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    lossy: Any = None if stream is None else LossyStream(stream)
    return Console(file=lossy, stderr=True)
