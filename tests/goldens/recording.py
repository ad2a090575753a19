"""Runs cases in several processes, each with 8 CPU devices.

JAX reads its settings when it is imported, so nothing here imports it before `_prepare_process`.
"""

import concurrent.futures
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["about", "case_names", "record_cases"]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Threads of XLA: 8 devices that wait for each other could starve in a smaller pool.
    "NPROC": "32",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8",
}


def case_names() -> list[str]:
    """All cases, the runs first, since they take longest."""
    os.environ.update(ENVIRONMENT)
    from tests.goldens import losses, runs

    return [*runs.CASES, *losses.CASES]


def record_cases(
    names: Sequence[str], *, jobs: int, compiled: Path | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compute cases, and yield each with its result, in order.

    Args:
      names: some of `case_names`.
      jobs: the number of processes.
      compiled: the folder for compiled programs, for the next recording; `None` keeps none.

    Yields:
      The name, and the results or an `"error"`, in JSON types.
    """
    with tempfile.TemporaryDirectory(prefix="goldens-") as directory:
        if any(name.startswith("runs/") for name in names):
            from tests.goldens import runs

            runs.prepare(Path(directory))
        with concurrent.futures.ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare_process,
            initargs=(compiled or Path(directory, "compiled"),),
        ) as pool:
            compute = functools.partial(_record_case, directory=Path(directory))
            for name, (seconds, result) in zip(names, pool.map(compute, names), strict=True):
                failed = f"failed: {result['error']}" if "error" in result else "done"
                print(f"{name}: {failed} ({seconds:.1f} s)", flush=True)
                yield name, result


def _prepare_process(compiled: Path) -> None:
    os.environ.update(ENVIRONMENT)
    # All processes share it; one that reads a half-written program compiles it again.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled.absolute())


def _record_case(name: str, *, directory: Path) -> tuple[float, dict[str, Any]]:
    """The seconds that a case took, and its result."""
    from tests.goldens import losses, runs

    start = time.monotonic()
    try:
        if name in runs.CASES:
            result = runs.record(name, directory)
        else:
            arrays = losses.record(name)
            result = {"arrays": {name: array.tolist() for name, array in arrays.items()}}
    except Exception as error:  # a case that fails is a result, too
        result = {"error": f"{type(error).__name__}: {error}"}
    return time.monotonic() - start, result


def about() -> dict[str, str]:
    """The commit, the machine and the versions that results belong to."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "commit": commit.stdout.strip(),
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
    }
