"""The process of one job: starts JAX, and runs the job's measurements.

python -m jaxcl.bench.gpu.worker SPEC.json
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.bench.gpu.recorder import DeviceLost, Recorder
from jaxcl.bench.gpu.sizes import FULL, TINY, Sizes

__all__ = ["DEVICE_LOST", "Spec", "main"]

DEVICE_LOST = 3
"""The exit status of a worker that needs a restart because its device failed."""


class Spec(NamedTuple):
    """The parent's request to a worker.

    Attributes:
      program: the module of this folder that measures.
      platform: the platform that JAX must use, "gpu" or "cpu".
      sizes: the sizes of the measurements.
      seed: the seed of all random inputs.
      results: the file of JSON lines to write.
      seconds: the time limit of the process.
      done: names of measurements to skip.
      pairs: a folder of prepared pairs for the training programs, if there is one.
    """

    program: str
    platform: str
    sizes: Sizes
    seed: int
    results: Path
    seconds: float
    done: tuple[str, ...] = ()
    pairs: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Spec":
        """Read a specification from the parent's JSON."""
        sizes = {"full": FULL, "tiny": TINY}[given["sizes"]["name"]]
        fields: dict[str, Any] = {name: given.get(name) for name in cls._fields}
        return cls(**{**fields, "sizes": sizes, "done": tuple(given["done"])})


def main(spec_file: str) -> int:
    """Run a job, and return the exit status."""
    spec = Spec.read(json.loads(Path(spec_file).read_text()))
    recorder = Recorder(
        spec.results, seconds=spec.seconds, done=spec.done, is_alive=_device_is_alive
    )
    program = importlib.import_module(f"jaxcl.bench.gpu.{spec.program}")
    if program.NEEDS_DEVICE:
        _check_platform(spec.platform)
    try:
        program.measure_all(recorder, spec)
    except DeviceLost:
        return DEVICE_LOST
    return 0


def _check_platform(wanted: str) -> None:
    import jax

    present = jax.default_backend()
    if present != wanted:
        raise RuntimeError(
            f"JAX runs on {present!r} instead of {wanted!r}; the text above says why, if a GPU was "
            "not found. --sizes tiny rehearses on a CPU"
        )


def _device_is_alive() -> bool:
    import jax
    import jax.numpy as jnp

    try:
        return int(jax.block_until_ready(jnp.arange(4).sum())) == 6
    except jax.errors.JaxRuntimeError:
        return False


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a broken device must not make the interpreter hang at its end
