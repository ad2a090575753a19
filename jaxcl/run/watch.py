"""Looks at a run from outside: what is compiled, and where its time goes."""

import functools
import os
import platform
from pathlib import Path

import jax
import jax.monitoring

from jaxcl.host.progress import say
from jaxcl.host.user_folders import cache_folder, make_private

__all__ = ["Watch", "keep_compiled"]

_WORTH_KEEPING_SECONDS = 0.3


def keep_compiled() -> None:
    """Keep compiled programs for later starts, unless `JAX_COMPILATION_CACHE_DIR` says where.

    They are native code, which JAX loads as it finds it. Hence they lie in the user's cache, and
    are used only where no other user could have written them. Those of a CPU are kept by host,
    since another's processor may lack an instruction.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    backend = jax.default_backend()
    kind = f"cpu-{platform.node()}" if backend == "cpu" else backend
    directory = cache_folder() / "compiled" / kind
    try:
        make_private(directory)
    except OSError as error:
        say(f"warning: compiled programs are neither kept nor reused: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)


class Watch:
    """Traces some steps, and says if a step had to be compiled again.

    A trace ends when the step behind it is under way, since only then are those asked for done.

    Args:
      directory: where a trace goes, for TensorBoard or Perfetto.
      profile: the first step of the trace, and the first behind it; `None` for none.
    """

    def __init__(self, directory: Path, profile: tuple[int, int] | None):
        self._directory, self._profile = directory, profile
        self._tracing = False
        self._compilations = _compilations()
        self._before = 0
        self._steps = 0

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Called right before each step is handed to the devices."""
        self._before = len(self._compilations)
        if self._profile is None or self._tracing or step >= self._profile[1]:
            return
        if step >= self._profile[0]:  # a run may go on in the middle of them
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def dispatched(self, step: int) -> None:
        """Called right after each step was handed to the devices."""
        if self._steps and len(self._compilations) > self._before:
            say(
                f"step {step} was compiled again, which takes as long as the first one: the shape "
                "or place of its batch or state has changed"
            )
        self._steps += 1

    def after(self, step: int) -> None:
        """Called when each step is under way, and the one before it is done."""
        if self._profile is not None and step >= self._profile[1]:
            self._stop()
            self._profile = None

    def _stop(self) -> None:
        if not self._tracing:
            if self._profile is not None:
                first, behind = self._profile
                say(f"no step from {first} to {behind - 1} was trained here: there is no trace")
            return
        self._tracing = False
        jax.profiler.stop_trace()
        say(f"a trace of the steps is in {self._directory}")


@functools.cache
def _compilations() -> list[float]:
    """Seconds of each compilation from now on, in this process."""
    found: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return found
