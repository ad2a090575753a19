"""PyTorch's side of part 3: both cross entropies over the whole matrix, eager and compiled.

python loss_speed_torch.py SPEC.json
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common_torch import (
    DEVICE,
    PeakMemory,
    checked,
    run,
    synchronize,
    time_calls,
    unit_rows,
)
from recorder import NotHere, Recorder

TEMPERATURE = 0.05
GRADIENTS = ("queries", "keys", "temperature")
ENTRIES = 2**25  # scores of the reference that exist at one time


def measure_all(recorder: Recorder, spec: dict[str, Any]) -> None:
    """Time gradients first, then forward passes."""
    sizes = spec["sizes"]
    exact = functools.cache(functools.partial(_exact, spec["seed"]))
    ways = {"PyTorch": loss, "PyTorch, compiled": torch.compile(loss, dynamic=False)}
    for gradients, dim, batch in itertools.product(
        (True, False), sizes["loss_dims"], sizes["loss_batches"]
    ):
        for way, function in ways.items():
            passes = "forward + backward" if gradients else "forward"
            recorder.measure(
                f"B = {batch:,}, d = {dim}: {way}, {passes}",
                functools.partial(_measure, function, batch, dim, gradients, spec, exact),
            )


def loss(queries: torch.Tensor, keys: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of both directions, over the whole matrix."""
    scores = (queries @ keys.T).float() / temperature
    labels = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def _measure(
    function: Callable,
    batch: int,
    dim: int,
    gradients: bool,
    spec: dict[str, Any],
    exact: Callable,
) -> dict[str, Any]:
    needed = 3 * 4 * batch**2
    if DEVICE == "cuda" and needed > (limit := torch.cuda.mem_get_info()[1]):
        raise NotHere(
            f"three float32 matrices take {needed / 2**30:.0f} of {limit / 2**30:.0f} GiB"
        )
    torch.compiler.reset()  # otherwise, earlier shapes count towards the limit of recompilations
    wanted = exact(batch, dim)
    inputs = [_inputs(spec["seed"] + 2 * number, batch, dim) for number in range(3)]
    memory = PeakMemory()
    call = functools.partial(_gradients if gradients else _forward, function)
    start = time.perf_counter()
    value, slopes = call(*inputs[0])
    synchronize()
    facts = {"compile_s": time.perf_counter() - start, **memory.facts()}
    # Scores are rounded to bfloat16 here, as in typical PyTorch code.
    errors = checked({"loss": value}, {"loss": wanted["loss"]}, tolerance=2e-2)
    named_slopes = dict(zip(GRADIENTS, slopes, strict=False))
    errors |= checked(named_slopes, {name: wanted[name] for name in named_slopes}, tolerance=1e-1)
    del value, slopes, named_slopes
    timed = time_calls(call, inputs, spec["sizes"])
    flops = (3 if gradients else 1) * 2.0 * batch**2 * dim
    return {**facts, "errors": errors, "flops": flops, "pairs": batch, **timed}


def _forward(function: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    with torch.no_grad():
        return function(*inputs), ()


def _gradients(function: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    value = function(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


def _inputs(seed: int, batch: int, dim: int) -> tuple[torch.Tensor, ...]:
    temperature = torch.tensor(TEMPERATURE, device=DEVICE, requires_grad=True)
    return unit_rows(seed, batch, dim), unit_rows(seed + 1, batch, dim), temperature


@torch.no_grad()
def _exact(seed: int, batch: int, dim: int) -> dict[str, torch.Tensor]:
    """Loss and gradients in float32, a chunk of queries at a time, on the host."""
    queries, keys, _ = (one.float() for one in _inputs(seed, batch, dim))
    chunks = range(0, batch, max(1, ENTRIES // batch))
    size = chunks.step
    columns = torch.full((batch,), -torch.inf, device=DEVICE)
    rows = torch.empty(batch, device=DEVICE)
    for start in chunks:
        scores = queries[start : start + size] @ keys.T / TEMPERATURE
        rows[start : start + size] = scores.logsumexp(1)
        columns = torch.logaddexp(columns, scores.logsumexp(0))
    to_queries, to_keys = torch.empty_like(queries), torch.zeros_like(keys)
    to_temperature = torch.zeros((), device=DEVICE)
    for start in chunks:
        chunk_queries = queries[start : start + size]
        scores = chunk_queries @ keys.T / TEMPERATURE
        weights = (scores - rows[start : start + size, None]).exp() + (scores - columns).exp()
        weights.diagonal(start).sub_(2)
        weights /= 2 * batch
        to_queries[start : start + size] = weights @ keys / TEMPERATURE
        to_keys += weights.T @ chunk_queries / TEMPERATURE
        to_temperature -= (weights * scores).sum() / TEMPERATURE
    own = (queries * keys).sum(1) / TEMPERATURE
    value = (rows + columns - 2 * own).mean() / 2
    results = dict(zip(GRADIENTS, (to_queries, to_keys, to_temperature), strict=True))
    return {"loss": value, **results}


if __name__ == "__main__":
    run(measure_all)
