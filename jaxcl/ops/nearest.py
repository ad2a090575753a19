"""Exact nearest neighbours in a sharded table, without a full matrix of similarities."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.arguments import as_vectors
from jaxcl.ops.pairs.sides import (
    ALL_COUNT,
    PairKeys,
    PairLabels,
    PairQueries,
    checked_labels,
    pair_scores,
)
from jaxcl.ops.varying import as_varying, full_like_varying
from jaxcl.typing import Array, AxisName, Float, Int, Integer, PyTree

__all__ = ["IMPLEMENTATIONS", "QUERY_TILE", "TILE", "Nearest", "nearest"]

IMPLEMENTATIONS = ("reference", "tiled")

QUERY_TILE, TILE = 256, 65_536
"""Queries and rows per tile: 64 MiB of float32 similarities. Wide, to sort fewer times."""

_GROUP = 32  # columns per group; before the sort, groups are selected by their maxima


class Nearest(NamedTuple):
    """The rows nearest to each query, nearest first; ties are in row order.

    Rows whose similarity is not finite are left out.

    Attributes:
      similarities: inner products; −∞ where fewer rows are allowed than requested.
      rows: row numbers in the whole table; −1 for none.
    """

    similarities: Float[Array, "q m"]
    rows: Int[Array, "q m"]


def nearest(
    queries: Float[Array, "q d"],
    table: Float[Array, "n d"],
    *,
    count: int,
    query_labels: PairLabels = ALL_COUNT,
    table_labels: PairLabels = ALL_COUNT,
    axis_name: AxisName | None = None,
    implementation: str = "tiled",
    query_tile: int = QUERY_TILE,
    tile: int = TILE,
) -> Nearest:
    """Find each query's nearest rows by inner product.

    Args:
      queries: this device's queries.
      table: this device's rows of the table.
      count: rows to find per query, at least 1.
      query_labels: the queries' labels, which mask pairs as in `jaxcl.ops.pairs`.
      table_labels: the rows' labels.
      axis_name: the mesh axes of an enclosing `jax.shard_map` over which both sides are sharded by
        row. Queries are gathered on all devices: with `b` queries in total, each device receives
        `(b - q) · d` numbers as queries and `2 · (b - q) · count` numbers as results.
      implementation: `"reference"` sorts all similarities; `"tiled"` merges the best rows of one
        tile at a time.
      query_tile: queries per tile.
      tile: rows per tile.

    Returns:
      The nearest rows on all devices, without gradient.

    Raises:
      ValueError: if the implementation is unknown, a count or tile is below 1, or a label does not
        fit in int32.
      TypeError: if labels are not integers, or vectors are not arrays of floats.

    Example:
      >>> import jax.numpy as jnp
      >>> table = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
      >>> result = nearest(jnp.eye(2), table, count=2)
      >>> result.rows.tolist(), result.similarities.tolist()
      ([[1, 2], [0, 1]], [[1.0, 1.0], [1.0, 0.0]])
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}"
        )
    if min(count, query_tile, tile) < 1:
        raise ValueError(
            f"count={count}, query_tile={query_tile}, tile={tile}; all must be at least 1"
        )
    queries, table = as_vectors("queries", queries), as_vectors("table", table)
    query_labels = checked_labels("query_labels", query_labels)
    table_labels = checked_labels("table_labels", table_labels)
    if implementation == "reference":
        query_tile, tile = queries.shape[0], table.shape[0]
    if not len(queries) or not len(table):
        shape, like = (len(queries), count), (queries, table)
        wide = jnp.promote_types(queries.dtype, jnp.float32)
        return Nearest(
            full_like_varying(shape, -jnp.inf, wide, like),
            full_like_varying(shape, -1, jnp.int32, like),
        )
    labelled_queries, labelled_table = lax.stop_gradient(
        ((queries, query_labels), (table, table_labels))
    )
    if axis_name is None:
        return _of_table(labelled_queries, labelled_table, jnp.int32(0), count, query_tile, tile)
    everyone = jax.tree.map(
        lambda leaf: lax.all_gather(leaf, axis_name, tiled=True), labelled_queries
    )
    first = lax.axis_index(axis_name) * table.shape[0]
    here = _of_table(everyone, labelled_table, first, count, query_tile, tile)
    # [devices, q, count] each: the results of every device for this device's queries. Devices are
    # in row order, so that `_best` still resolves ties by row.
    parts = jax.tree.map(
        lambda leaf: lax.all_to_all(
            leaf.reshape(-1, queries.shape[0], count), axis_name, 0, 0, tiled=True
        ),
        here,
    )
    flat = jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1).reshape(queries.shape[0], -1), parts)
    return _best(flat, count)


def _of_table(
    queries: PyTree,
    table: PyTree,
    first: Array,
    count: int,
    query_tile: int,
    tile: int,
) -> Nearest:
    """Find the nearest among this device's rows, which are numbered from `first`."""
    num_queries, num_rows = queries[0].shape[0], table[0].shape[0]
    height, width = _even(num_queries, query_tile), _even(num_rows, tile)

    def of_queries(start: Integer[Array, ""]) -> Nearest:
        query_block = jax.tree.map(
            lambda leaf: lax.dynamic_slice_in_dim(leaf, start, height), queries
        )

        def one_tile(number: Integer[Array, ""] | int, best: Nearest) -> Nearest:
            offset = jnp.minimum(number * width, num_rows - width)
            table_tile = jax.tree.map(
                lambda leaf: lax.dynamic_slice_in_dim(leaf, offset, width), table
            )
            rows = offset + jnp.arange(width, dtype=jnp.int32)
            # If tiles do not divide the rows, the last one overlaps the previous one to keep its
            # shape. The shared rows are masked, since they would otherwise be found twice.
            more = _tile(query_block, table_tile, first + rows, rows >= number * width, count)
            return _best(_joined(best, more), count)

        empty = Nearest(
            jnp.full(
                (height, count), -jnp.inf, jnp.promote_types(query_block[0].dtype, jnp.float32)
            ),
            jnp.full((height, count), -1, jnp.int32),
        )
        start_of_loop = as_varying(empty, (queries, table, first))
        return lax.fori_loop(0, -(-num_rows // width), one_tile, start_of_loop)

    starts = [min(start, num_queries - height) for start in range(0, num_queries, height)]
    blocks = lax.map(of_queries, as_varying(jnp.array(starts), queries))
    # The last block of queries may overlap too; only its new queries are appended.
    new = num_queries - height * (len(starts) - 1)
    return jax.tree.map(
        lambda leaf: jnp.concatenate([leaf[:-1].reshape(-1, count), leaf[-1, height - new :]]),
        blocks,
    )


def _even(size: int, tile: int) -> int:
    """The smallest tile size that keeps the number of tiles, in whole groups if possible."""
    least = -(-size // -(-size // tile))
    return min(-(-least // _GROUP) * _GROUP, tile, size)


def _tile(queries: PyTree, table: PyTree, rows: Array, new: Array, count: int) -> Nearest:
    vectors, labels = queries
    scale = jnp.ones(vectors.shape[0], jnp.promote_types(vectors.dtype, jnp.float32))
    similarities, allowed = pair_scores(
        PairQueries(vectors, scale, labels), PairKeys(table[0], None, table[1]), hardness=0.0
    )
    # `top_k` sorts −0 below 0, but such ties must be in row order.
    similarities = jnp.where(similarities == 0, 0, similarities)
    # `top_k` sorts NaN above all numbers.
    allowed &= new[None] & jnp.isfinite(similarities)
    similarities = jnp.where(allowed, similarities, -jnp.inf)
    return _best(_candidates(similarities, rows, count), min(count, rows.shape[0]))


def _candidates(similarities: Float[Array, "q k"], rows: Array, count: int) -> Nearest:
    """Select columns of a tile, in row order, that include the best and are fast to sort.

    The best `count` columns are in the `count` groups with the largest maxima, since every other
    column ranks after those `count` maxima. Ties between maxima keep the groups with the lowest
    rows.
    """
    num_queries, width = similarities.shape
    num_groups = -(-width // _GROUP)
    if num_groups <= 2 * count:  # groups would cover more than half of the tile
        return Nearest(similarities, jnp.broadcast_to(rows, similarities.shape))
    missing = num_groups * _GROUP - width
    padded = jnp.pad(similarities, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    groups = padded.reshape(num_queries, num_groups, _GROUP)
    _, best = lax.top_k(groups.max(2), count)
    best = jnp.sort(best, axis=1)  # back in row order, which resolves ties
    chosen = jnp.take_along_axis(groups, best[:, :, None], axis=1)
    grouped_rows = jnp.pad(rows, (0, missing)).reshape(num_groups, _GROUP)
    return Nearest(chosen.reshape(num_queries, -1), grouped_rows[best].reshape(num_queries, -1))


def _joined(first: Nearest, second: Nearest) -> Nearest:
    return jax.tree.map(lambda left, right: jnp.concatenate([left, right], 1), first, second)


def _best(candidates: Nearest, count: int) -> Nearest:
    """Select the best candidates; candidates with equal similarities must be in row order."""
    # `top_k` resolves ties by position.
    similarities, positions = lax.top_k(candidates.similarities, count)
    rows = jnp.take_along_axis(candidates.rows, positions, axis=1)
    return Nearest(similarities, jnp.where(similarities > -jnp.inf, rows, -1))
