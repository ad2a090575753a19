"""The jaxcl side of `jaxcl.bench.bench_alternatives`, in a separate process.

    python -m jaxcl.bench.alternatives_jaxcl SPEC.json

SPEC.json names what to measure; `measured_process.py` describes the answers. Programs are compiled
before the measurements.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.bench.measured_process import serve
from jaxcl.losses import infonce_loss
from jaxcl.ops.mesh import put_batch
from jaxcl.ops.nearest import nearest
from jaxcl.run.training import build_training
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.step.length_buckets import Buckets
from jaxcl.typing import SIDES, Array

__all__ = ["main", "step_settings"]


def main(spec_file: str) -> None:
    """Prepare one measurement and serve it."""
    spec = json.loads(Path(spec_file).read_text())
    with np.load(spec["arrays"]) as stored:
        arrays = dict(stored)
    prepare = {"loss": prepare_loss, "nearest": prepare_nearest}
    serve(prepare.get(spec["part"], prepare_update)(spec, arrays), {"jax": jax.__version__})


def prepare_loss(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """Compile the symmetric loss with the gradients of both sides; return a function to run it."""
    sides = [jnp.asarray(arrays[side]) for side in ("queries", "keys")]

    def loss(queries: Array, keys: Array) -> Array:
        return infonce_loss(queries, keys, temperature=spec["temperature"]).mean()

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*sides).compile()

    def call() -> list[float]:
        value, gradients = program(*sides)
        return [float(value), *(float(jnp.linalg.norm(gradient)) for gradient in gradients)]

    return call


def prepare_nearest(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """Compile the exact search for the nearest rows; return a function that runs it."""
    table = jnp.asarray(arrays["table"])
    search = functools.partial(nearest, count=spec["count"])
    program = jax.jit(search).lower(table, table).compile()
    return lambda: [float(np.linalg.norm(jax.device_get(program(table, table).similarities)))]


def prepare_update(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """Compile an update of the pretrained model; return a function that runs it.

    `spec["way"]` selects gradient caching and length buckets.
    """
    cached, buckets = "cached" in spec["way"], "buckets" in spec["way"]
    settings = step_settings(spec if cached or buckets else {**spec, "chunk": None})
    widths = {side: Buckets(*map(tuple, one)) for side, one in spec.get("buckets", {}).items()}
    training = build_training(settings, buckets=widths if buckets else None)
    state = training.init()
    inputs = {
        side: {
            name.removeprefix(f"inputs/{side}/"): array
            for name, array in arrays.items()
            if name.startswith(f"inputs/{side}/")
        }
        for side in SIDES
    }
    labels = dict.fromkeys(("row", "text", "group"), np.arange(spec["batch"], dtype=np.int32))
    batch = put_batch({**inputs, **labels}, training.mesh)
    # Compiled before the measurements; the state is donated, as in a run.
    program = jax.jit(training.train_step, donate_argnums=0).lower(state, batch).compile()

    def call() -> list[float]:
        nonlocal state
        state, metrics = program(state, batch)
        # sentence-transformers has no gradient of the temperature.
        norm = optax.tree.norm(metrics.leaf_gradient_norms["towers"])
        return [float(metrics.loss), float(norm)]

    return call


def step_settings(spec: Mapping[str, Any]) -> Settings:
    """The settings of an update: `configs/finetune.py` with other sizes."""
    changes = {
        "model.pretrained": spec["model"],
        "global_batch_size": spec["batch"],
        "grad_cache.chunk_size": spec["chunk"],
        "grad_cache.length_buckets": spec.get("length_buckets", 1),
        "data.max_tokens": spec["max_tokens"],
        "optimizer.learning_rate": spec["learning_rate"],
        "optimizer.schedule": "warmup_constant",
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": spec["weight_decay"],
        "optimizer.clip_norm": spec["clip_norm"],
        "loss.temperature": dict.fromkeys(("initial", "minimum", "maximum"), spec["temperature"]),
    }
    if not spec["dropout"]:
        changes["model.options.dropout"] = 0.0
    return read_settings(changed_config(load_config("finetune"), changes))


if __name__ == "__main__":
    main(sys.argv[1])
