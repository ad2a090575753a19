"""The public operations on a pair matrix: one number per row and per column."""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.ops.arguments import as_vectors, check_numbers
from jaxcl.ops.collectives import gather
from jaxcl.ops.pairs import reference
from jaxcl.ops.pairs.exchange import TilePasses, ring_backward, ring_forward
from jaxcl.ops.pairs.reductions import (
    COUNT,
    LOGSUMEXP,
    SOFTPLUS,
    SUM,
    Reduction,
    Residuals,
    nothing,
)
from jaxcl.ops.pairs.sides import ALL_COUNT, PairKeys, PairLabels, PairQueries, checked_labels
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Float, Range

__all__ = [
    "EXCHANGES",
    "IMPLEMENTATIONS",
    "pair_count",
    "pair_logsumexp",
    "pair_softplus",
    "pair_sum",
]

IMPLEMENTATIONS = ("reference", "tiled", "pallas_tpu", "pallas_gpu")
EXCHANGES = ("gather", "ring")

_LARGEST_REFERENCE = 2**20  # entries: 4 MiB of float32 scores, the size of one tile


class _Execution(NamedTuple):
    """How a reduction runs; `pair_logsumexp` documents the fields."""

    axis_name: AxisName | None
    exchange: str
    implementation: str | None
    tile: int | None


def pair_logsumexp(
    queries: Float[Array, "q d"],
    keys: Float[Array, "k d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"],
    query_labels: PairLabels = ALL_COUNT,
    key_labels: PairLabels = ALL_COUNT,
    key_bias: Float[Array, " k"] | None = None,
    hardness: float = 0.0,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
    tile: int | None = None,
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    r"""Compute the log-sum-exp of each row and column of the scores, without storing them.

    With $x_{ij} = \langle q_i, k_j\rangle$, the same without gradient $\bar x_{ij}$, the scores
    $s_{ij} = x_{ij} / \tau_i + b_j + \alpha \bar x_{ij}$, and the mask $m_{ij}$ of allowed pairs,

    $$r_i = \log \sum_j m_{ij} e^{s_{ij}}, \qquad c_j = \log \sum_i m_{ij} e^{s_{ij}}.$$

    Both come from one product, whose tiles are recomputed in the backward pass.

    Args:
      queries: one vector per row.
      keys: one vector per column.
      temperature: $\tau > 0$, one for all rows or one per row.
      query_labels: the rows' labels, which mask pairs.
      key_labels: the columns' labels.
      key_bias: $b$, in nats; for example minus the logarithm of how often a key is sampled.
      hardness: $\alpha \ge 0$; larger values give hard pairs more weight.
      axis_name: mesh axes of an enclosing `jax.shard_map` over which both sides are sharded by row.
        Each device returns its rows over all keys, and its columns over all queries.
      exchange: `"gather"` copies the keys of all devices to every device. A device receives
        `(devices - 1) · k · d` numbers, and sends as many for the gradient (a reduce-scatter).
        `"ring"` holds the keys of one other device at a time. It moves `(devices - 1) · k · d`
        numbers in each pass, and `devices · k · d` for the gradient, which travels with the keys.
        Both move three more numbers per column, for its value and gradient.
      implementation: `"reference"` stores all scores and is differentiated by JAX; `"tiled"`
        computes `tile²` scores at a time; `"pallas_tpu"` does the same in TPU kernels;
        `"pallas_gpu"` uses kernels for NVIDIA GPUs, Hopper or newer, for bfloat16 or float16
        without guides. `None` uses the reference up to 2²⁰ entries, and `"tiled"` above.
      tile: rows and columns per tile; `None` for the implementation's default.

    Returns:
      Rows and columns, in nats, as float32 or wider; −∞ with gradient 0 if all pairs are masked.

    Raises:
      ValueError: if a name is unknown, a label does not fit in int32, the two sides' labels do not
        match, or a ring is combined with the reference.
      TypeError: if labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, columns = pair_logsumexp(jnp.eye(2), jnp.eye(2), temperature=1.0)
      >>> rows.round(4).tolist()  # log(e + 1)
      [1.3133, 1.3133]

    Reference:
      The online sum is from Milakov and Gimelshein, "Online normalizer calculation for softmax",
      2018; the ring is from Liu et al., "Ring Attention", 2023.
    """
    queries, keys = _as_sides(queries, keys)
    return _reduce_pairs(
        LOGSUMEXP,
        PairQueries(queries, _inverse(temperature, queries), query_labels),
        PairKeys(keys, key_bias, key_labels),
        _Execution(axis_name, exchange, implementation, tile),
        hardness=hardness,
    )


def pair_sum(
    queries: Float[Array, "q d"],
    keys: Float[Array, "k d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"],
    query_labels: PairLabels = ALL_COUNT,
    key_labels: PairLabels = ALL_COUNT,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
    tile: int | None = None,
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    """Sum the scores of allowed pairs over each row and column, in nats.

    The arguments are as for `pair_logsumexp`; the sum of a fully masked row or column is 0.
    """
    queries, keys = _as_sides(queries, keys)
    return _reduce_pairs(
        SUM,
        PairQueries(queries, _inverse(temperature, queries), query_labels),
        PairKeys(keys, None, key_labels),
        _Execution(axis_name, exchange, implementation, tile),
    )


def pair_softplus(
    queries: Float[Array, "q d"],
    keys: Float[Array, "k d"],
    *,
    scale: float | Float[Array, ""],
    bias: float | Float[Array, ""],
    query_labels: PairLabels = ALL_COUNT,
    key_labels: PairLabels = ALL_COUNT,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
    tile: int | None = None,
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    r"""Sum $\log(1 + e^{s_{ij}})$ over the allowed pairs of each row and column.

    The scores are $s_{ij} = a \langle q_i, k_j\rangle + b$ with `scale` $a$ and `bias` $b$; the
    other arguments are as for `pair_logsumexp`. The sum of a fully masked row or column is 0.
    """
    queries, keys = _as_sides(queries, keys)
    check_numbers("scale", scale, Range())
    check_numbers("bias", bias, Range())
    return _reduce_pairs(
        SOFTPLUS,
        PairQueries(queries, jnp.full(queries.shape[:1], scale, _wide(queries)), query_labels),
        PairKeys(keys, jnp.full(keys.shape[:1], bias, _wide(keys)), key_labels),
        _Execution(axis_name, exchange, implementation, tile),
    )


def pair_count(
    queries: Float[Array, "q d"],
    keys: Float[Array, "k d"],
    *,
    query_labels: PairLabels = ALL_COUNT,
    key_labels: PairLabels = ALL_COUNT,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
    tile: int | None = None,
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    """Count the allowed pairs in each row and column; arguments are as for `pair_logsumexp`."""
    queries, keys = map(jax.lax.stop_gradient, _as_sides(queries, keys))
    return _reduce_pairs(
        COUNT,
        PairQueries(queries, jnp.ones(queries.shape[:1], _wide(queries)), query_labels),
        PairKeys(keys, None, key_labels),
        _Execution(axis_name, exchange, implementation, tile),
    )


def _as_sides(queries: Array, keys: Array) -> tuple[Float[Array, "q d"], Float[Array, "k d"]]:
    return as_vectors("queries", queries), as_vectors("keys", keys)


def _reduce_pairs(
    reduction: Reduction,
    queries: PairQueries,
    keys: PairKeys,
    execution: _Execution,
    *,
    hardness: float = 0.0,
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    axis_name, exchange, implementation, tile = execution
    queries = queries._replace(labels=checked_labels("query_labels", queries.labels))
    keys = keys._replace(labels=checked_labels("key_labels", keys.labels))
    check_numbers("hardness", hardness, Range(least=0))
    _check(queries, keys, execution)
    by_tiles = "tiled" if implementation in (None, "reference") else implementation
    # Imported on demand, since Pallas is slow to import and only two implementations need it.
    module = importlib.import_module(f"jaxcl.ops.pairs.{by_tiles}")
    passes = TilePasses(module.forward, module.backward, hardness, tile or module.TILE)
    if not len(queries.vectors) or not len(keys.vectors):
        return nothing(reduction, queries, keys)
    if axis_name is not None and exchange == "ring":
        if implementation == "reference":
            raise ValueError(
                "exchange='ring' does not work with implementation='reference'; use 'tiled'"
            )
        both = as_varying((queries, keys), (queries, keys))
        return _by_tiles(passes, reduction, axis_name, *both)
    if axis_name is not None:
        keys = gather(keys, axis_name)
    entries = queries.vectors.shape[0] * keys.vectors.shape[0]
    if implementation == "reference" or (implementation is None and entries <= _LARGEST_REFERENCE):
        rows, columns = reference.reduce_pairs(reduction, queries, keys, hardness=hardness)
    else:
        both = as_varying((queries, keys), (queries, keys))
        rows, columns = _by_tiles(passes, reduction, None, *both)
    if axis_name is not None:
        columns = reduction.join_devices(columns, axis_name)
    return rows, columns


def _reduced_by_tiles(
    passes: TilePasses,
    reduction: Reduction,
    ring: AxisName | None,
    queries: PairQueries,
    keys: PairKeys,
) -> tuple[Float[Array, " q"], Float[Array, " k"]]:
    if ring is not None:
        return ring_forward(passes, reduction, queries, keys, ring)
    return passes.reduce(reduction, queries, keys)


_by_tiles = jax.custom_vjp(_reduced_by_tiles, nondiff_argnums=(0, 1, 2))


def _by_tiles_forward(
    passes: TilePasses,
    reduction: Reduction,
    ring: AxisName | None,
    queries: PairQueries,
    keys: PairKeys,
) -> tuple[tuple[Array, Array], Residuals]:
    # Not `_by_tiles`, whose gradient has no derivative in forward mode. For a second derivative,
    # JAX differentiates these loops and the backward ones.
    reduced = _reduced_by_tiles(passes, reduction, ring, queries, keys)
    return reduced, Residuals(queries, keys, reduced)


def _by_tiles_backward(
    passes: TilePasses,
    reduction: Reduction,
    ring: AxisName | None,
    residuals: Residuals,
    cotangents: tuple[Array, Array],
) -> tuple[PairQueries, PairKeys]:
    queries, keys, _ = residuals
    if ring is not None:
        gradients = ring_backward(passes, reduction, residuals, cotangents, ring)
    else:
        gradients = passes.differentiate(reduction, residuals, cotangents)
    to_vectors, to_scales, to_keys, to_biases = gradients
    no_gradient: Any = None  # labels only mask pairs
    return (
        queries._replace(
            vectors=to_vectors.astype(queries.vectors.dtype),
            scale=to_scales.astype(queries.scale.dtype),
            labels=no_gradient,
        ),
        keys._replace(
            vectors=to_keys.astype(keys.vectors.dtype),
            bias=None if keys.bias is None else to_biases.astype(keys.bias.dtype),
            labels=no_gradient,
        ),
    )


_by_tiles.defvjp(_by_tiles_forward, _by_tiles_backward)


def _inverse(temperature: float | Array, queries: Float[Array, "q d"]) -> Float[Array, " q"]:
    """The inverse temperature of each row, in float32, since it may overflow float16."""
    check_numbers("temperature", temperature, Range(above=0))
    temperature = jnp.asarray(temperature)
    scale = 1 / temperature.astype(jnp.promote_types(temperature.dtype, jnp.float32))
    return jnp.broadcast_to(scale, queries.shape[:1]).astype(_wide(queries))


def _wide(vectors: Array) -> jnp.dtype:
    return jnp.promote_types(vectors.dtype, jnp.float32)


def _check(queries: PairQueries, keys: PairKeys, execution: _Execution) -> None:
    _, exchange, implementation, tile = execution
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}"
        )
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown; use one of {', '.join(EXCHANGES)}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be at least 1")
    if queries.vectors.shape[1] != keys.vectors.shape[1]:
        raise ValueError(
            f"queries have {queries.vectors.shape[1]} features and keys {keys.vectors.shape[1]}"
        )
    query_labels, key_labels = queries.labels, keys.labels
    for name in ("different", "equal"):
        if len(getattr(query_labels, name)) != len(getattr(key_labels, name)):
            raise ValueError(
                f"queries have {len(getattr(query_labels, name))} labels in {name!r} and keys "
                f"{len(getattr(key_labels, name))}; give both sides equally many"
            )
    if (query_labels.guide is None) != (key_labels.guide is None):
        raise ValueError("only one side has guide embeddings; give both or neither")
    for side, size in (
        (query_labels, queries.vectors.shape[0]),
        (key_labels, keys.vectors.shape[0]),
    ):
        for leaf in jax.tree.leaves(side):
            if leaf.shape[0] != size:
                raise ValueError(
                    f"{leaf.shape[0]} labels do not match {size} vectors; give one per row"
                )
