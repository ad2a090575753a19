"""The PyTorch side of `jaxcl.bench.bench_loss`: symmetric cross entropy, eager and compiled.

A separate program that needs only torch and NumPy. It reads the shape to measure from its argument,
as JSON, and prints the results as JSON in its last line.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def main() -> None:
    """Measure on the GPU if there is one."""
    spec = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = [_side(seed, spec, device) for seed in (0, 1)]
    temperature = torch.tensor(spec["temperature"], device=device, requires_grad=True)
    inputs = (*sides, temperature)
    rounds: dict[str, list[float]] = {}
    facts: dict[str, Any] = {"torch": torch.__version__}
    ways = {"PyTorch": loss, "PyTorch, compiled": torch.compile(loss)}
    for name, way in ways.items():
        try:
            forward = _times(functools.partial(_forward, way, inputs), device, spec["rounds"])
            both = _times(functools.partial(_both, way, inputs), device, spec["rounds"])
        except torch.cuda.OutOfMemoryError:
            facts[f"does not fit, {name}"] = ""
            torch.cuda.empty_cache()
            continue
        rounds |= {name: both, f"{name}, forward": forward}
        facts["PyTorch's loss"] = float(_forward(way, inputs))
    print(json.dumps({"rounds": rounds, "facts": facts}))


def loss(queries: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of both directions over the whole matrix."""
    scores = (queries @ keys.T).float() / temperature
    labels = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def _side(seed: int, spec: dict[str, Any], device: str) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(spec["batch"], spec["dim"]))
    rows = rows.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    side = torch.tensor(rows, device=device, dtype=getattr(torch, spec["dtype"]))
    return side.requires_grad_()


def _forward(way: Callable, inputs: tuple) -> torch.Tensor:
    with torch.no_grad():
        return way(*inputs)


def _both(way: Callable, inputs: tuple) -> None:
    torch.autograd.grad(way(*inputs), inputs)


def _times(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Milliseconds per call, after two warm-up calls."""
    times = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            times.append(1e3 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
