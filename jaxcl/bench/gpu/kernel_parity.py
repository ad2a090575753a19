"""Part 2: the errors of `pallas_gpu` and `tiled`, relative to the exact loss in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.bench.gpu.exact import exact_infonce
from jaxcl.bench.gpu.loss_speed import (
    GRADIENTS,
    LOSS_TOLERANCE,
    TEMPERATURE,
    TOLERANCE,
    loss_of,
    require_kernels,
)
from jaxcl.bench.gpu.measure import PeakMemory, checked, compile_program, unit_rows
from jaxcl.bench.gpu.recorder import Recorder
from jaxcl.bench.gpu.worker import Spec
from jaxcl.typing import Array

__all__ = ["NEEDS_DEVICE", "measure_all"]

NEEDS_DEVICE = True


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Check values first and then gradients, so that one failing kernel does not hide another."""
    for dim in spec.sizes.parity_dims:
        for batch in spec.sizes.parity_batches:
            sides = [unit_rows(spec.seed + side, batch, dim, dtype="bfloat16") for side in (0, 1)]
            queries, keys = sides
            exact = functools.cache(
                functools.partial(exact_infonce, queries, keys, TEMPERATURE, dtype="float64")
            )
            for way in ("pallas_gpu", "tiled"):
                for masked in (False, True):
                    name = f"{way}, B = {batch:,}, d = {dim}" + ", masked" * masked
                    check = functools.partial(_check, way, sides, exact, masked)
                    recorder.measure(f"{name}: values", functools.partial(check, False))
                    recorder.measure(f"{name}: gradients", functools.partial(check, True))


def _check(
    way: str, sides: list[Array], exact: Any, masked: bool, gradients: bool
) -> dict[str, Any]:
    if way == "pallas_gpu":
        require_kernels()
    # Ids that are all different mask nothing, but run the kernels' code for masks.
    ids = jnp.arange(sides[0].shape[0]) if masked else None
    memory = PeakMemory()
    loss = functools.partial(loss_of(way), ids=ids)
    inputs = (*sides, jnp.float32(TEMPERATURE))
    function = jax.value_and_grad(loss, (0, 1, 2)) if gradients else loss
    program = compile_program(function, *inputs)
    wanted = exact()
    results = jax.device_get(program.call(*inputs))
    value, slopes = results if gradients else (results, ())
    errors = checked({"loss": value}, {"loss": wanted["loss"]}, tolerance=LOSS_TOLERANCE)
    if gradients:
        named_slopes = dict(zip(GRADIENTS, slopes, strict=True))
        wanted = {name: wanted[name] for name in GRADIENTS}
        errors["errors"] |= checked(named_slopes, wanted, tolerance=TOLERANCE)["errors"]
    return {**program.facts, **errors, **memory.facts()}
