"""Part 4: pairs per second of a training step, with each implementation of attention."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcl.bench.gpu.measure import PeakMemory, checked, compile_program, time_calls
from jaxcl.bench.gpu.recorder import NotHere, Recorder
from jaxcl.bench.gpu.sizes import Cell, step_flops
from jaxcl.bench.gpu.worker import Spec
from jaxcl.losses import Loss, infonce_loss
from jaxcl.models import Towers, TransformerEncoder, make_towers
from jaxcl.models.transformer import ATTENTIONS
from jaxcl.ops.mesh import make_mesh
from jaxcl.step.batch_loss import LossOfBatch, make_loss
from jaxcl.step.train_step import TemperatureBounds, init_state, make_train_step
from jaxcl.typing import SIDES, Array, Batch, PyTree

__all__ = ["NEEDS_DEVICE", "encoder_towers", "measure_all"]

NEEDS_DEVICE = True

_DROPOUT = 0.1
_TEMPERATURE = TemperatureBounds(initial=0.05, minimum=0.01, maximum=1.0)
_LEARNING_RATE = 2e-5
_TOLERANCES = {"loss": 2e-2, "gradient": 1e-1}  # bfloat16 against float32, through every layer


def measure_all(recorder: Recorder, spec: Spec) -> None:
    """Time every cell with each attention."""
    for cell, attention in itertools.product(spec.sizes.cells, reversed(ATTENTIONS)):
        name = f"{cell.name}: jaxcl, attention by {attention}"
        recorder.measure(name, functools.partial(_measure, cell, attention, spec))


def encoder_towers(
    cell: Cell, *, attention: str = "xla", compute_dtype: str = "bfloat16", dropout: float = 0.0
) -> Towers:
    """The cell's encoder, shared by both sides: BERT's, with a projection of the pooled tokens."""
    encoder = cell.encoder

    def make_encoder(rngs: Any) -> TransformerEncoder:
        return TransformerEncoder(
            encoder.vocabulary_size,
            dim=encoder.hidden_dim,
            max_tokens=cell.num_tokens,
            hidden_dim=encoder.hidden_dim,
            num_layers=encoder.num_layers,
            num_heads=encoder.num_heads,
            mlp_dim=encoder.mlp_dim,
            attention=attention,
            norm_position="post",
            dropout=dropout,
            compute_dtype=compute_dtype,
            rngs=rngs,
        )

    return make_towers(make_encoder, shared=True)


def _measure(cell: Cell, attention: str, spec: Spec) -> dict[str, Any]:
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise NotHere("cuDNN's attention needs an NVIDIA GPU")
    errors = _check(cell, attention, spec)
    memory = PeakMemory()
    towers = encoder_towers(cell, attention=attention, dropout=_DROPOUT)
    optimizer = optax.adamw(_LEARNING_RATE)
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    step = make_train_step(_loss(cell, towers), optimizer, mesh, temperature=_TEMPERATURE)
    batches = [_batch(spec.seed + number, cell, cell.batch_size) for number in range(4)]
    init = functools.partial(
        init_state, init_towers=towers.init, optimizer=optimizer, temperature=_TEMPERATURE
    )
    state = jax.jit(init)(jax.random.key(spec.seed))
    program = compile_program(step, state, batches[0])

    def advance(batch: Batch) -> Array:
        nonlocal state
        state, metrics = program.call(state, batch)
        return metrics.loss

    first_loss = float(advance(batches[0]))
    facts = memory.facts()
    if not np.isfinite(first_loss):
        raise FloatingPointError(f"the first loss is {first_loss}")
    timed = time_calls(advance, [(batch,) for batch in batches], spec.sizes)
    work = {"flops": step_flops(cell), "pairs": cell.batch_size}
    return {**program.facts, **facts, **errors, **work, **timed}


def _check(cell: Cell, attention: str, spec: Spec) -> dict[str, Any]:
    """Compare loss and gradient of a few rows, without dropout, to float32 and whole batches."""
    rows = spec.sizes.check_rows
    chunk = None if cell.chunk_size is None else rows // 2
    small = cell._replace(batch_size=rows, chunk_size=chunk)
    batch = _batch(spec.seed, small, rows)
    with jax.default_matmul_precision("highest"):
        exact = small._replace(chunk_size=None)
        towers = encoder_towers(exact, compute_dtype="float32")
        initial = jax.jit(towers.init)(jax.random.key(spec.seed))
        params = {"towers": initial, "log_temperature": jnp.log(_TEMPERATURE.initial)}
        wanted = _loss_and_gradient(_loss(exact, towers), params, batch)
    towers = encoder_towers(small, attention=attention)
    results = _loss_and_gradient(_loss(small, towers), params, batch)
    errors: dict[str, float] = {}
    for name, tolerance in _TOLERANCES.items():
        one = checked({name: results[name]}, {name: wanted[name]}, tolerance=tolerance)
        errors |= one["errors"]
    return {"errors": errors}


def _loss_and_gradient(loss: LossOfBatch, params: PyTree, batch: Batch) -> dict[str, np.ndarray]:
    function: Callable = jax.value_and_grad(lambda params: loss(params, {}, batch, None)[0])
    value, gradient = jax.device_get(jax.jit(function)(params))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    return {"loss": value, "gradient": flat}


def _loss(cell: Cell, towers: Towers) -> LossOfBatch:
    """The loss from queries to keys, as in sentence-transformers' MultipleNegativesRankingLoss."""
    chunks = None if cell.chunk_size is None else dict.fromkeys(SIDES, cell.chunk_size)
    loss = Loss(functools.partial(infonce_loss, directions=("query_to_key",)))
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    return make_loss(towers, loss, mesh, masks={}, chunk_sizes=chunks)


def _batch(seed: int, cell: Cell, rows: int) -> Batch:
    rng = np.random.default_rng(seed)
    shape = rows, cell.num_tokens
    tokens = {
        side: {
            "tokens": jnp.asarray(rng.integers(1, cell.encoder.vocabulary_size, shape, np.int32))
        }
        for side in SIDES
    }
    return {**tokens, "row": jnp.arange(rows, dtype=jnp.int32)}
