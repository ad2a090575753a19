"""Profile a run, report a slow first step and recompilations, and cache compiled programs."""

import functools
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.monitoring

from jaxcl.host.progress import say
from jaxcl.host.user_folders import cache_folder, make_private

__all__ = ["Watch", "keep_compiled", "profiled_steps"]

_WORTH_KEEPING_SECONDS = 0.3
_SECONDS_UNTIL_LINES = (10.0, 50.0, 60.0)
"""The waits before the lines about a slow first step; the last wait repeats."""


def keep_compiled() -> None:
    """Cache compiled programs on disk, unless `JAX_COMPILATION_CACHE_DIR` is set.

    The programs are native code, which JAX loads without any check. Therefore they are in the
    user's cache, and are used only if no other user can write there. Each host has a folder for its
    CPU programs, since the processor of another host may lack an instruction.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    backend = jax.default_backend()
    kind = f"cpu-{platform.node()}" if backend == "cpu" else backend
    directory = cache_folder() / "compiled" / kind
    try:
        make_private(directory)
    except OSError as error:
        say(f"warning: compiled programs are not cached: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)


def profiled_steps(text: str | None) -> tuple[int, int] | None:
    """Parse the steps of `--profile`."""
    if text is None:
        return None
    steps = re.fullmatch(r"(\d+):(\d+)", text)
    if not steps or not 0 < int(steps[1]) < int(steps[2]):
        raise ValueError(f"--profile={text}; give the first step to trace and the first one after")
    return int(steps[1]), int(steps[2])


class Watch:
    """Trace some steps, and report if the first step takes long or a step is compiled again.

    A trace ends when the step after it has been dispatched, since only then are the traced steps
    complete.

    Args:
      directory: folder for the trace, which TensorBoard and Perfetto can read.
      profile: first step to trace, and first step after the trace; `None` for no trace.
    """

    def __init__(self, directory: Path, profile: tuple[int, int] | None):
        self._directory, self._profile = directory, profile
        self._tracing = False
        self._compilations = _compilations()
        self._before = 0
        self._steps = 0
        self._first = _FirstStep()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._first.end()
        self._stop()

    def ending_first(self, advance: Callable[..., None]) -> Callable[..., None]:
        """Make `advance`, which is called after each step is complete, end the first step."""

        def ended(*arguments: object) -> None:
            self._first.end()
            advance(*arguments)

        return ended

    def before(self, step: int) -> None:
        """Start the trace if it begins with this step; called before each step is dispatched."""
        if not self._steps and jax.process_index() == 0:
            self._first.begin(step)
        self._before = len(self._compilations)
        if self._profile is None or self._tracing or step >= self._profile[1]:
            return
        if step >= self._profile[0]:  # a run may resume in the middle of the steps to trace
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def dispatched(self, step: int) -> None:
        """Report if this step was compiled again; called after each step is dispatched."""
        if self._steps and len(self._compilations) > self._before:
            say(
                f"step {step} was compiled again, which takes as long as the first time: the shape "
                "or sharding of its batch or state has changed"
            )
        self._steps += 1
        self._first.is_compiled = True

    def after(self, step: int) -> None:
        """Stop the trace if it ends before this step; called when the previous step is complete."""
        if self._profile is not None and step >= self._profile[1]:
            self._stop()
            self._profile = None

    def _stop(self) -> None:
        if not self._tracing:
            if self._profile is not None:
                first, end = self._profile
                say(f"there is no trace, since no step from {first} to {end - 1} was trained here")
            return
        self._tracing = False
        jax.profiler.stop_trace()
        say(f"wrote a trace of the steps to {self._directory}")


class _FirstStep:
    """Reports that the first step is still running if it takes long.

    A large model on a few cores takes minutes, in which nothing else is printed.

    Attributes:
      is_compiled: whether the step's program is compiled.
    """

    def __init__(self) -> None:
        self.is_compiled = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Start to wait for the end of the step."""
        self._thread = threading.Thread(target=self._wait, args=(step,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop waiting."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _wait(self, step: int) -> None:
        start = time.monotonic()
        first, *later = _SECONDS_UNTIL_LINES
        seconds = first
        while not self._over.wait(seconds):
            state = "not complete yet" if self.is_compiled else "still being compiled"
            say(
                f"step {step} is {state} after {time.monotonic() - start:.0f} s; the first step is "
                "the slowest, and takes minutes for large models on a few cores"
            )
            seconds = later.pop(0) if len(later) > 1 else later[0]


@functools.cache
def _compilations() -> list[float]:
    """A list to which each compilation in this process, from now on, appends its seconds."""
    durations: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return durations
