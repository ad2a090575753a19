"""The machine and its two ceilings: a large bf16 product, and a copy of device memory."""

import importlib.metadata
import platform
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.bench.gpu.measure import checked, compile_program, time_calls
from jaxcl.bench.gpu.recorder import Recorder
from jaxcl.bench.gpu.worker import Spec

__all__ = ["COPY", "NEEDS_DEVICE", "PRODUCT", "measure_all"]

NEEDS_DEVICE = True
PRODUCT, COPY = "bf16 product", "device copy"


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Describe the device, and measure both ceilings."""
    recorder.write(event="machine", **_machine())
    recorder.measure(PRODUCT, lambda: _product(spec))
    recorder.measure(COPY, lambda: _copy(spec))


def _product(spec: Spec) -> dict[str, Any]:
    size = spec.sizes.product_size
    keys = jax.random.split(jax.random.key(spec.seed), 4)
    squares = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
    inputs = [*zip(squares[:2], squares[2:], strict=True)]
    program = compile_program(jnp.matmul, *inputs[0])
    rows = min(size, 256)
    wanted = jnp.matmul(
        inputs[0][0][:rows].astype(jnp.float32),
        inputs[0][1].astype(jnp.float32),
        precision="highest",
    )
    errors = checked(
        {"product": program.call(*inputs[0])[:rows]}, {"product": wanted}, tolerance=2e-2
    )
    timed = time_calls(program.call, inputs, spec.sizes)
    return {**program.facts, "bytes": 6.0 * size**2, "flops": 2.0 * size**3, **errors, **timed}


def _copy(spec: Spec) -> dict[str, Any]:
    size = spec.sizes.copy_mebibytes * 2**20 // 4
    inputs = [(jax.random.normal(jax.random.key(spec.seed + i), (size,)),) for i in range(2)]
    # XLA removes a copy that changes nothing; one addition per number costs no time next to memory.
    program = compile_program(lambda array: array + 1, *inputs[0])
    errors = checked(
        {"copy": program.call(*inputs[0])[:4_096]},
        {"copy": inputs[0][0][:4_096] + 1},
        tolerance=1e-6,
    )
    timed = time_calls(program.call, inputs, spec.sizes)
    return {**program.facts, "bytes": 8.0 * size, **errors, **timed}


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    stats: dict[str, Any] = device.memory_stats() or {}
    wanted = ("jax", "nvidia-", "flax", "optax", "numpy", "torch")
    versions = {
        name: one.version
        for one in importlib.metadata.distributions()
        if (name := one.metadata["Name"] or "").lower().startswith(wanted)
    }
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "allocator_limit_mib": stats.get("bytes_limit", 0) / 2**20,
        "versions": {"python": platform.python_version(), **dict(sorted(versions.items()))},
    }
