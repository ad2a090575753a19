"""Compiles programs, times them in turn, and finds the largest batch that fits in memory."""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxcl.typing import PyTree

__all__ = [
    "Compiled",
    "compile_all",
    "facts_of",
    "largest_that_fits",
    "memory_bytes",
    "milliseconds",
]


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      call: runs the program on the arguments that it was compiled for.
      seconds: the compile time.
      temporary_mebibytes: memory on each device in addition to arguments and results.
    """

    call: Callable[[], PyTree]
    seconds: float
    temporary_mebibytes: float


def compile_all(functions: Mapping[str, Callable], arguments: tuple) -> dict[str, Compiled]:
    """Compile functions for the same arguments."""
    compiled = {}
    for name, function in functions.items():
        start = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        memory: Any = program.memory_analysis()
        call = functools.partial(program, *arguments)
        compiled[name] = Compiled(call, seconds, memory.temp_size_in_bytes / 2**20)
    return compiled


def milliseconds(calls: Mapping[str, Callable[[], PyTree]], *, rounds: int) -> dict[str, list]:
    """Time calls in turn, round after round, after one untimed call each."""
    for call in calls.values():
        jax.block_until_ready(call())
    rounds_of: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            rounds_of[name].append(1e3 * (time.perf_counter() - start))
    return rounds_of


def memory_bytes() -> int:
    """The memory of a device, or for a CPU device its share of the available memory."""
    stats: dict[str, Any] | None = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 2**10 // jax.device_count()
    raise OSError("neither the device nor /proc/meminfo reports the size of the memory")


def facts_of(compiled: Mapping[str, Compiled]) -> dict[str, float]:
    """Facts for a record: compile times and temporary memory of programs."""
    return {
        **{f"compile s, {name}": one.seconds for name, one in compiled.items()},
        **{
            f"temporary MiB a device, {name}": one.temporary_mebibytes
            for name, one in compiled.items()
        },
    }


def largest_that_fits(
    functions: Mapping[str, Callable], arguments_of: Callable[[int], PyTree], *, start: int
) -> dict[str, int]:
    """Facts for a record: the largest batch that fits in a device's memory, found by doubling.

    Args:
      functions: name -> function; functions are compiled, but not run.
      arguments_of: batch size -> abstract arguments.
      start: the first size to try; the result is 0 if this size does not fit.
    """
    budget = memory_bytes()
    return {
        f"largest batch in {budget / 2**30:.1f} GiB, {name}": _largest(
            function, arguments_of, start=start, budget=budget
        )
        for name, function in functions.items()
    }


def _largest(
    function: Callable, arguments_of: Callable[[int], PyTree], *, start: int, budget: int
) -> int:
    fits, size = 0, start
    while size <= 2**24:
        analysis = jax.jit(function).lower(*arguments_of(size)).compile().memory_analysis()
        sizes = ("temp", "argument", "output")
        if sum(getattr(analysis, f"{kind}_size_in_bytes") for kind in sizes) > budget:
            break
        fits, size = size, 2 * size
    return fits
