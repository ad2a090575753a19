"""Reduce the matrix of scores tile by tile, forward and backward, without storing it.

If the tile size does not divide a side, the last tile starts earlier. All tiles then have the same
shape, and nothing is padded or copied. Rows that a previous tile has covered are masked.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.pairs.reductions import Reduced, Reduction, Residuals, nothing
from jaxcl.ops.pairs.reference import reduce_pairs
from jaxcl.ops.pairs.sides import PairKeys, PairQueries, pair_scores
from jaxcl.ops.varying import full_like_varying
from jaxcl.typing import Array, Bool, Float, Int, PyTree

__all__ = ["TILE", "TileOps", "backward", "backward_by", "forward", "forward_by"]

TILE = 1024
"""Rows and columns per tile: 4 MiB of float32 scores, which fit in a CPU's cache."""


class TileOps(NamedTuple):
    """The operations on one tile.

    Attributes:
      reduce: (reduction, queries, keys, hardness=…) -> the tile's reduced rows and columns.
      weigh: (reduction, residuals, cotangents, hardness=…) -> gradients of the inner products, in
        the vectors' type, and of the columns' biases.
    """

    reduce: Callable[..., tuple[Array, Array]]
    weigh: Callable[..., tuple[Array, Array]]


def forward_by(
    ops: TileOps,
    reduction: Reduction,
    queries: PairQueries,
    keys: PairKeys,
    *,
    hardness: float,
    tile: int,
) -> Reduced:
    """Reduce every row and every column, with one product per tile."""
    num_queries, num_keys = queries.vectors.shape[0], keys.vectors.shape[0]

    def one_tile(index: Int[Array, ""], reduced: tuple[Array, Array]) -> tuple[Array, Array]:
        (rows, i), (columns, j) = _offsets(index, num_queries, num_keys, tile)
        query_tile = _masked(_slice(queries, rows, num_queries, tile), i)
        key_tile = _masked(_slice(keys, columns, num_keys, tile), j)
        more_rows, more_columns = ops.reduce(reduction, query_tile, key_tile, hardness=hardness)
        by_row, by_column = reduced
        return (
            _update(reduction.join, by_row, rows, more_rows),
            _update(reduction.join, by_column, columns, more_columns),
        )

    start = nothing(reduction, queries, keys)
    return lax.fori_loop(0, _num_tiles(num_queries, num_keys, tile), one_tile, start)


def backward_by(
    ops: TileOps,
    reduction: Reduction,
    residuals: Residuals,
    cotangents: Reduced,
    *,
    hardness: float,
    tile: int,
) -> tuple[Float[Array, "q d"], Float[Array, " q"], Float[Array, "k d"], Float[Array, " k"]]:
    """Compute the gradients of query vectors, scales, key vectors and biases.

    Each tile takes three products, including one to recompute its scores.
    """
    queries, keys, reduced = residuals
    wide = jnp.promote_types(queries.vectors.dtype, jnp.float32)
    num_queries, num_keys = queries.vectors.shape[0], keys.vectors.shape[0]

    def one_tile(index: Int[Array, ""], gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        (rows, i), (columns, j) = _offsets(index, num_queries, num_keys, tile)
        query_tile, query_values, query_cotangents = _slice(
            (queries, reduced[0], cotangents[0]), rows, num_queries, tile
        )
        key_tile, key_values, key_cotangents = _slice(
            (keys, reduced[1], cotangents[1]), columns, num_keys, tile
        )
        weights, to_biases = ops.weigh(
            reduction,
            Residuals(_masked(query_tile, i), _masked(key_tile, j), (query_values, key_values)),
            (query_cotangents, key_cotangents),
            hardness=hardness,
        )
        # The vectors include rows that a previous tile has covered, with weights of 0.
        to_queries, to_keys, all_to_biases = gradients
        product = jnp.einsum("qk,kd->qd", weights, key_tile.vectors, preferred_element_type=wide)
        to_queries = _update(jnp.add, to_queries, rows, product)
        product = jnp.einsum("qk,qd->kd", weights, query_tile.vectors, preferred_element_type=wide)
        to_keys = _update(jnp.add, to_keys, columns, product)
        return to_queries, to_keys, _update(jnp.add, all_to_biases, columns, to_biases)

    shapes = (queries.vectors.shape, keys.vectors.shape, num_keys)
    start = tuple(full_like_varying(shape, 0.0, wide, (queries, keys)) for shape in shapes)
    num_tiles = _num_tiles(num_queries, num_keys, tile)
    to_queries, to_keys, to_biases = lax.fori_loop(0, num_tiles, one_tile, start)
    # If G is the gradient of the scores, the gradient of a query is a_i Σ_j G_ij k_j, and the
    # gradient of its scale, Σ_j G_ij ⟨q_i, k_j⟩, follows from it without another pass over tiles.
    to_scales = jnp.einsum("qd,qd->q", to_queries, queries.vectors.astype(wide)) / queries.scale
    return to_queries, to_scales, to_keys, to_biases


def _weigh(
    reduction: Reduction, residuals: Residuals, cotangents: Reduced, *, hardness: float
) -> tuple[Float[Array, "q k"], Float[Array, " k"]]:
    queries, keys, reduced = residuals
    scores, allowed = pair_scores(queries, keys, hardness=hardness)
    scores = jnp.where(allowed, scores, -jnp.inf)
    gradient = reduction.weigh(scores, reduced[0][:, None], cotangents[0][:, None])
    gradient += reduction.weigh(scores, reduced[1][None], cotangents[1][None])
    # In the vectors' type: with a float32 factor, products would not run on bfloat16 matrix units.
    weights = (gradient * queries.scale[:, None]).astype(queries.vectors.dtype)
    return weights, gradient.sum(0)


_XLA = TileOps(reduce_pairs, _weigh)

forward = functools.partial(forward_by, _XLA)
"""`forward_by` with XLA's operations."""

backward = functools.partial(backward_by, _XLA)
"""`backward_by` with XLA's operations."""


def _num_tiles(num_queries: int, num_keys: int, tile: int) -> int:
    return -(-num_queries // tile) * -(-num_keys // tile)


def _offsets(
    index: Int[Array, ""], num_queries: int, num_keys: int, tile: int
) -> tuple[tuple[Array, Bool[Array, " q"]], tuple[Array, Bool[Array, " k"]]]:
    """The first row and column of a tile, and whether its rows and columns are new."""
    tiles_per_row = -(-num_keys // tile)
    return (
        _offset(index // tiles_per_row, num_queries, tile),
        _offset(index % tiles_per_row, num_keys, tile),
    )


def _offset(number: Int[Array, ""], size: int, tile: int) -> tuple[Array, Bool[Array, " r"]]:
    length = min(tile, size)
    start = jnp.minimum(number * tile, size - length)
    return start, start + jnp.arange(length) >= number * tile


def _slice(side: PyTree, start: Int[Array, ""], size: int, tile: int) -> PyTree:
    length = min(tile, size)
    return jax.tree.map(lambda rows: lax.dynamic_slice_in_dim(rows, start, length), side)


def _masked(side: PyTree, new: Bool[Array, " r"]) -> PyTree:
    """Mask all rows of a side except the new ones."""
    valid = side.labels.valid
    labels = side.labels._replace(valid=new if valid is None else valid & new)
    return side._replace(labels=labels)


def _update(join: Callable, values: Array, start: Int[Array, ""], part: Array) -> Array:
    before = lax.dynamic_slice_in_dim(values, start, part.shape[0])
    return lax.dynamic_update_slice_in_dim(values, join(before, part), start, 0)
