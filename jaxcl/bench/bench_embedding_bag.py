"""How fast is each implementation of `embedding_bag`, forward and backward?

python -m jaxcl.bench embedding_bag [--rounds N] [--json FILE]
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.bench.timing import milliseconds
from jaxcl.models.embedding_bag import IMPLEMENTATIONS, embedding_bag
from jaxcl.typing import PADDING_ID, Array, Float, Int

__all__ = ["DEFAULT_SHAPES", "BagShape", "main", "measure", "row_lengths", "zipf_tokens"]


class BagShape(NamedTuple):
    """Sizes of one bag: `batch_size` rows of `width` tokens, `mean_tokens` of them not padding."""

    batch_size: int
    width: int
    mean_tokens: int
    hidden_dim: int = 512
    vocabulary_size: int = 16_384


DEFAULT_SHAPES = (BagShape(1_024, 32, 12), BagShape(1_024, 256, 110))
"""The queries and keys of `configs/code_search.py`."""


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure the default shapes."""
    parser = benchmark_parser("embedding_bag", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    return measure(DEFAULT_SHAPES, rounds=parser.parse(argv).rounds)


def measure(shapes: Sequence[BagShape], *, rounds: int) -> dict[str, Any]:
    """Time all implementations in turn, round after round.

    Args:
      shapes: the shapes to measure.
      rounds: the number of repetitions.

    Returns:
      The record that `jaxcl.bench` prints, in milliseconds.
    """
    calls: dict[str, Callable[[], Any]] = {}
    compile_seconds: dict[str, float] = {}
    for shape in shapes:
        arguments = _arguments(shape)
        for implementation in IMPLEMENTATIONS:
            for pass_name, function in _passes(implementation).items():
                name = f"{implementation} {pass_name} [{shape.batch_size}, {shape.width}]"
                start = time.perf_counter()
                compiled = jax.jit(function).lower(*arguments).compile()
                compile_seconds[f"compile s, {name}"] = time.perf_counter() - start
                calls[name] = functools.partial(compiled, *arguments)
    return {
        "shapes": {f"[{shape.batch_size}, {shape.width}]": shape._asdict() for shape in shapes},
        "unit": "ms",
        "rounds": milliseconds(calls, rounds=rounds),
        "facts": compile_seconds,
    }


def zipf_tokens(
    rng: np.random.Generator, count: int, *, vocabulary_size: int
) -> Int[np.ndarray, " _"]:
    """Token ids as frequent as words: id $r$ has a probability proportional to $1 / r$."""
    cumulative = np.cumsum(1.0 / np.arange(1, vocabulary_size))
    # 0 is the id of padding.
    return 1 + np.searchsorted(cumulative, rng.random(count) * cumulative[-1]).astype(np.int32)


def row_lengths(
    rng: np.random.Generator, count: int, *, mean: int, width: int
) -> Int[np.ndarray, " _"]:
    """Numbers of tokens with about this mean, clipped to between 1 and `width`."""
    return np.clip(rng.gamma(2.0, mean / 2.0, count), 1, width).astype(np.int64)


def _arguments(
    shape: BagShape,
) -> tuple[Float[Array, "v h"], Int[Array, "b t"], Float[Array, "b t"]]:
    rng = np.random.default_rng(0)
    size = (shape.batch_size, shape.width)
    tokens = zipf_tokens(rng, shape.batch_size * shape.width, vocabulary_size=shape.vocabulary_size)
    lengths = row_lengths(rng, shape.batch_size, mean=shape.mean_tokens, width=shape.width)
    real = np.arange(shape.width) < lengths[:, None]
    table = rng.normal(size=(shape.vocabulary_size, shape.hidden_dim)).astype(np.float32)
    return (
        jnp.asarray(table),
        jnp.asarray(np.where(real, tokens.reshape(size), PADDING_ID)),
        jnp.asarray(real, jnp.float32),
    )


def _passes(implementation: str) -> dict[str, Callable]:
    def forward(table: Array, tokens: Array, weights: Array) -> Array:
        return embedding_bag(table, tokens, weights, implementation=implementation)

    def both(table: Array, tokens: Array, weights: Array) -> tuple[Array, Array]:
        """The table's gradient only, since weights are a mask and are not learned."""
        bags, pull_back = jax.vjp(lambda table: forward(table, tokens, weights), table)
        return bags, pull_back(bags)[0]

    return {"forward": forward, "forward+backward": both}
