"""Checks, times and peak memory for the PyTorch scripts of this folder."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from recorder import CheckFailed, DeviceLost, Recorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_MOST_CALLS = 32
_MOST_SECONDS = 4.0


def run(measure_all: Callable[[Recorder, dict[str, Any]], None]) -> None:
    """Read the parent's specification, and measure."""
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    if spec["platform"] == "gpu" and DEVICE != "cuda":
        raise SystemExit("PyTorch finds no GPU")
    recorder = Recorder(
        spec["results"], seconds=spec["seconds"], done=spec["done"], is_alive=_is_alive
    )
    try:
        measure_all(recorder, spec)
    except DeviceLost:
        sys.exit(3)


def machine() -> dict[str, Any]:
    """The device and PyTorch's version."""
    kind = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {"platform": DEVICE, "device_kind": kind, "devices": 1, "versions": versions}


def unit_rows(seed: int, rows: int, dim: int) -> torch.Tensor:
    """Random bfloat16 rows of norm 1, with a gradient."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    vectors = torch.randn(rows, dim, generator=generator, device=DEVICE)
    return torch.nn.functional.normalize(vectors, dim=-1).bfloat16().requires_grad_()


def checked(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, tolerance: float
) -> dict[str, float]:
    """Relative errors by name; raises `CheckFailed` if an error is above the tolerance."""
    errors = {}
    for name, reference in wanted.items():
        difference = (found[name].double() - reference.double()).norm() / reference.double().norm()
        errors[name] = float(difference)
        if not errors[name] <= tolerance:
            raise CheckFailed(f"{name} differs from the reference by {errors[name]:.1e}")
    return errors


class PeakMemory:
    """The allocator's peak since this object was created."""

    def __init__(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def facts(self) -> dict[str, Any]:
        """`peak_mib`, on a GPU."""
        if DEVICE != "cuda":
            return {}
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20, "peak_is_bound": False}


def time_calls(
    call: Callable[..., object], inputs: Sequence[tuple], sizes: dict[str, Any]
) -> dict[str, list[float]]:
    """Milliseconds per call in each round, cycling through the inputs, after warm-up calls."""
    rotation = itertools.cycle(inputs)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call(*next(rotation))
        synchronize()
        return time.perf_counter() - start

    seconds(1)
    once = seconds(1)
    count = int(min(max(sizes["round_seconds"] / once, 1), _MOST_CALLS))
    rounds = int(max(_MOST_SECONDS / (count * once), min(3, sizes["rounds"])))
    times = [seconds(count) for _ in range(min(rounds, sizes["rounds"]) + 1)]
    return {"ms": [1e3 * one / count for one in times[1:]]}


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _is_alive() -> bool:
    try:
        return int(torch.arange(4, device=DEVICE).sum()) == 6
    except RuntimeError:
        return False
