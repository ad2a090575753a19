"""How much time does gradient caching cost, and how much memory does it save?

    python -m jaxcl.bench grad_cache [--batch N] [--chunk N] [--rounds N] [--json FILE]

Measures the loss and gradient of a transformer with dropout on one device, in one batch and in
chunks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.timing import compile_all, facts_of, largest_that_fits, milliseconds
from jaxcl.losses import Loss, infonce_loss
from jaxcl.models import TransformerEncoder, make_towers
from jaxcl.ops.mesh import make_mesh
from jaxcl.step.batch_loss import make_loss
from jaxcl.typing import SIDES, Batch, PyTree

__all__ = ["main", "measure"]

_VOCABULARY = 1_024


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure one shape."""
    parser = benchmark_parser("grad_cache", __doc__)
    parser.add_argument("--batch", type=int, default=256, help="pairs")
    parser.add_argument("--chunk", type=int, default=32, help="rows encoded at a time")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a text")
    parser.add_argument("--dim", type=int, default=128, help="width of the encoder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    return measure(**vars(parser.parse(argv)))


def measure(
    *, batch: int, chunk: int, tokens: int, dim: int, layers: int, rounds: int
) -> dict[str, Any]:
    """Time the whole batch and the chunks in turn, round after round.

    Args:
      batch: the number of pairs.
      chunk: the number of rows encoded at a time.
      tokens: the length of a text.
      dim: the width of the encoder.
      layers: the layers of the encoder.
      rounds: the number of repetitions.

    Returns:
      The record that `jaxcl.bench` prints, in milliseconds.
    """
    towers = make_towers(
        lambda rngs: TransformerEncoder(
            _VOCABULARY,
            dim=dim,
            max_tokens=tokens,
            hidden_dim=dim,
            num_layers=layers,
            num_heads=4,
            mlp_dim=4 * dim,
            dropout=0.1,
            compute_dtype="float32",
            rngs=rngs,
        ),
        shared=True,
    )
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])

    def gradient(chunk_sizes: dict[str, int] | None) -> Callable:
        loss = make_loss(towers, Loss(infonce_loss), mesh, masks={}, chunk_sizes=chunk_sizes)
        return jax.value_and_grad(lambda params, batch, key: loss(params, {}, batch, key)[0])

    functions = {
        "whole batch": gradient(None),
        f"chunks of {chunk}": gradient(dict.fromkeys(SIDES, chunk)),
    }
    key = jax.random.key(0)
    params = {"towers": towers.init(key), "log_temperature": jnp.log(0.05)}
    compiled = compile_all(functions, (params, _batch(batch, tokens), key))
    rates = milliseconds({name: one.call for name, one in compiled.items()}, rounds=rounds)
    whole_times, chunk_times = rates.values()
    ratios = [b / a for a, b in zip(whole_times, chunk_times, strict=True)]
    facts: dict[str, Any] = {"chunks / whole, median": float(np.median(ratios))}
    facts |= facts_of(compiled)
    facts |= largest_that_fits(functions, lambda size: _abstract(params, size, tokens), start=chunk)
    return {
        "shapes": {"batch": batch, "chunk": chunk, "tokens": tokens, "dim": dim, "layers": layers},
        "unit": "ms",
        "rounds": rates,
        "facts": facts,
    }


def _batch(size: int, tokens: int) -> Batch:
    rng = np.random.default_rng(0)
    sides = {
        side: {"tokens": jnp.asarray(rng.integers(1, _VOCABULARY, (size, tokens)), jnp.int32)}
        for side in SIDES
    }
    return {**sides, "row": jnp.arange(size, dtype=jnp.int32)}


def _abstract(params: PyTree, size: int, tokens: int) -> tuple[PyTree, ...]:
    texts = {"tokens": jax.ShapeDtypeStruct((size, tokens), jnp.int32)}
    batch = {**dict.fromkeys(SIDES, texts), "row": jax.ShapeDtypeStruct((size,), jnp.int32)}
    return jax.eval_shape(lambda: params), batch, jax.eval_shape(lambda: jax.random.key(0))
