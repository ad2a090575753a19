"""Part 1: do the library's results on this device agree with float64?"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.assignment import PRESETS, assign
from jaxcl.bench.gpu.measure import checked, compile_program, unit_rows
from jaxcl.bench.gpu.recorder import CheckFailed, Recorder
from jaxcl.bench.gpu.search_speed import check_neighbours, topic_pairs
from jaxcl.bench.gpu.worker import Spec
from jaxcl.losses import (
    decoupled_infonce_loss,
    distillation_loss,
    hard_infonce_loss,
    infonce_loss,
    running_estimate_loss,
    sigmoid_pair_loss,
    supervised_infonce_loss,
)
from jaxcl.ops.nearest import nearest
from jaxcl.typing import Array

__all__ = ["NEEDS_DEVICE", "measure_all"]

NEEDS_DEVICE = True
_TOLERANCES = {"float32": 1e-4, "float64": 1e-9}


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Check every loss, the nearest neighbours, and one assignment."""
    known = losses(spec.sizes.smoke_rows)
    for name in spec.sizes.losses:
        recorder.measure(f"{name} loss", functools.partial(_check_loss, known[name], spec))
    recorder.measure("nearest neighbours", lambda: _check_nearest(spec))
    recorder.measure(
        f"assignment of {spec.sizes.assigned_rows:,} rows", lambda: _check_assignment(spec)
    )


def losses(num_rows: int) -> Mapping[str, Callable[..., Array]]:
    """The library's losses by name: `(queries, keys, temperature=…, implementation=…)`."""
    labels = jnp.arange(num_rows) // 3

    def running_estimate(queries: Array, keys: Array, **options: Any) -> Array:
        estimates = jnp.zeros((num_rows, 2), queries.dtype)
        return running_estimate_loss(queries, keys, estimates=estimates, **options)[0]

    def distillation(queries: Array, keys: Array, temperature: Array, implementation: str) -> Array:
        del implementation  # this loss compares no rows
        scores = jnp.sin(jnp.arange(num_rows**2, dtype=queries.dtype)).reshape(num_rows, -1)
        return distillation_loss(queries, keys, teacher_scores=scores, temperature=temperature)

    return {
        "infonce": infonce_loss,
        "sigmoid": sigmoid_pair_loss,
        "supervised": functools.partial(supervised_infonce_loss, labels=labels),
        "decoupled": decoupled_infonce_loss,
        "hard": functools.partial(hard_infonce_loss, positive_share=0.01),
        "running_estimate": running_estimate,
        "distillation": distillation,
    }


def _check_loss(loss: Callable[..., Array], spec: Spec) -> dict[str, Any]:
    """Compare `tiled` in both precisions with `reference` in float64, value and gradients."""
    shape = spec.sizes.smoke_rows, spec.sizes.smoke_dim
    sides = [np.asarray(unit_rows(spec.seed + side, *shape)) for side in (0, 1)]

    def evaluated(implementation: str, dtype: str) -> tuple[dict[str, np.ndarray], float]:
        def mean(queries: Array, keys: Array, temperature: Array) -> Array:
            return loss(
                queries, keys, temperature=temperature, implementation=implementation
            ).mean()

        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            inputs = [jnp.asarray(array, dtype) for array in (*sides, np.float64(0.1))]
            program = compile_program(jax.value_and_grad(mean, (0, 1, 2)), *inputs)
            value, gradients = program.call(*inputs)
            named = zip(
                ("loss", "queries", "keys", "temperature"), (value, *gradients), strict=True
            )
            return {name: np.asarray(one) for name, one in named}, program.facts["compile_s"]

    wanted, seconds = evaluated("reference", "float64")
    errors: dict[str, float] = {}
    for dtype, tolerance in _TOLERANCES.items():
        results, more_seconds = evaluated("tiled", dtype)
        seconds += more_seconds
        errors[dtype] = max(checked(results, wanted, tolerance=tolerance)["errors"].values())
    return {"errors": errors, "compile_s": seconds}


def _check_nearest(spec: Spec) -> dict[str, Any]:
    queries, table = (
        unit_rows(spec.seed + side, 4 * spec.sizes.smoke_rows, spec.sizes.smoke_dim)
        for side in (0, 1)
    )
    with jax.default_matmul_precision("highest"):
        result = jax.jit(functools.partial(nearest, count=spec.sizes.search_count))(queries, table)
    return check_neighbours(result, queries, table, tolerance=1e-5)


def _check_assignment(spec: Spec) -> dict[str, Any]:
    rows, batch = spec.sizes.assigned_rows, min(64, spec.sizes.assigned_batch)
    sides = [np.asarray(side) for side in topic_pairs(spec.seed, rows, spec.sizes.search_dim)]
    start = time.perf_counter()
    order = assign(*sides, block_size=batch, seed=spec.seed, settings=PRESETS["light"])
    seconds = time.perf_counter() - start
    if sorted(order.tolist()) != list(range(rows)):
        raise CheckFailed(f"the order of {rows:,} rows is no permutation of them")
    inside, random = (
        _similarity_in_batches(sides, rows, batch) for rows in (order, np.arange(rows))
    )
    if not inside > random + 0.02:
        raise CheckFailed(
            f"rows of a batch have the mean similarity {inside:.3f}, random {random:.3f}"
        )
    return {
        "s": [seconds],
        "facts": {"with compilation": True, "similarity in a batch": inside, "random": random},
    }


def _similarity_in_batches(sides: list[np.ndarray], order: np.ndarray, batch: int) -> float:
    rows = order[: len(order) // batch * batch]
    queries, keys = (side[rows].reshape(-1, batch, side.shape[1]) for side in sides)
    scores = queries @ keys.transpose(0, 2, 1)
    others = ~np.eye(batch, dtype=bool)
    return float(scores[:, others].mean())
