"""Checks one jitted program, and measures its time and memory."""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.bench.gpu.recorder import CheckFailed
from jaxcl.bench.gpu.sizes import Sizes
from jaxcl.bench.timing import milliseconds
from jaxcl.cost.program_cost import traffic
from jaxcl.typing import Array, Float, PyTree

__all__ = [
    "CompiledProgram",
    "PeakMemory",
    "checked",
    "compile_program",
    "relative_error",
    "time_calls",
    "unit_rows",
]

_MOST_CALLS = 32
_IN_FLIGHT = 4
_MOST_SECONDS = 4.0  # for all rounds of one program


class CompiledProgram(NamedTuple):
    """A compiled program.

    Attributes:
      call: runs the program.
      facts: compile seconds; MiB of its arguments, results and temporaries; bytes of memory traffic
        in one call, as `jaxcl.cost.program_cost` reads them off the compiled program.
    """

    call: Callable[..., PyTree]
    facts: dict[str, Any]


def compile_program(function: Callable, *arguments: PyTree) -> CompiledProgram:
    """Compile a function, jitted or not, for arguments of these shapes."""
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    facts: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    memory: Any = program.memory_analysis()
    if memory is not None:
        sizes = ("argument", "output", "temp")
        total = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in sizes)
        facts["program_mib"] = (total - memory.alias_size_in_bytes) / 2**20
    # A backend may write programs in a form that `program_cost` cannot read.
    with contextlib.suppress(IndexError, KeyError, ValueError):
        facts["bytes"] = traffic(program.as_text()).memory
    return CompiledProgram(program, facts)


def time_calls(
    call: Callable[..., PyTree], inputs: Sequence[tuple], sizes: Sizes
) -> dict[str, list[float]]:
    """Measure the milliseconds per call in each round, cycling through the inputs.

    A round repeats short calls until it lasts `sizes.round_seconds`, and ends when all their
    results are ready; two warm-up rounds are not reported.
    """
    rotation = itertools.cycle(inputs)
    jax.block_until_ready(call(*next(rotation)))
    start = time.perf_counter()
    jax.block_until_ready(call(*next(rotation)))
    seconds = time.perf_counter() - start
    count = int(np.clip(sizes.round_seconds / seconds, 1, _MOST_CALLS))
    affordable = int(_MOST_SECONDS / (count * seconds))

    def one_round() -> list[PyTree]:
        running: collections.deque[PyTree] = collections.deque()
        for _ in range(count):
            if len(running) == _IN_FLIGHT:  # more results at a time would fill the memory
                jax.block_until_ready(running.popleft())
            running.append(call(*next(rotation)))
        return list(running)

    rounds = int(np.clip(affordable, min(3, sizes.rounds), sizes.rounds))
    times = milliseconds({"calls": one_round}, rounds=rounds)["calls"]
    return {"ms": [one / count for one in times]}


def checked(
    found: dict[str, Any], wanted: dict[str, Any], *, tolerance: float
) -> dict[str, dict[str, float]]:
    """Relative errors by name.

    Raises:
      CheckFailed: if an error is above the tolerance or not a number.
    """
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    if not max(errors.values()) <= tolerance or not np.isfinite([*errors.values()]).all():
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in errors.items())
        raise CheckFailed(f"differs from the reference by more than {tolerance:.0e}: {listed}")
    return {"errors": errors}


def relative_error(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64, on the host; NaN where either is not finite.

    Example:
      >>> round(relative_error(np.array([3.0, 4.1]), np.array([3.0, 4.0])), 6)  # 0.1 / 5
      0.02
    """
    found, wanted = (np.asarray(array).astype(np.float64) for array in (found, wanted))
    if found.shape != wanted.shape:
        return float("nan")
    scale = np.linalg.norm(wanted)
    return float(np.linalg.norm(found - wanted) / scale) if scale else float("nan")


class PeakMemory:
    """The allocator's peak during one measurement.

    A process's peak never falls. If a measurement did not raise the peak, the figure is an upper
    bound, and `peak_is_bound` says so. CPUs report no peak.
    """

    def __init__(self) -> None:
        self._before = _peak()

    def facts(self) -> dict[str, Any]:
        """`peak_mib` and `peak_is_bound`, where the device reports its memory."""
        after = _peak()
        if after is None:
            return {}
        return {"peak_mib": after / 2**20, "peak_is_bound": after == self._before}


def _peak() -> int | None:
    stats: dict[str, Any] | None = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def unit_rows(seed: int, *shape: int, dtype: str = "float32") -> Float[Array, "_ _"]:
    """Random rows of norm 1, drawn on the device."""
    rows = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return (rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype)
