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
"""Queries and rows of a tile: 64 MiB of float32 similarities. Wide, since each tile is one sort."""

_GROUP = 32  # columns that are represented by their maximum before the sort


class Nearest(NamedTuple):
    """The rows nearest to each query, the nearest first; ties are in the order of rows.

    A row whose similarity is not finite is near no query.

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
    """Each query's nearest rows by inner product.

    Args:
      queries: this device's queries.
      table: this device's rows of the table.
      count: rows to find per query, at least 1.
      query_labels: the queries' labels, which mask pairs as in `jaxcl.ops.pairs`.
      table_labels: the rows' labels.
      axis_name: the mesh axes of an enclosing `jax.shard_map` over which both sides are sharded by
        row. All queries visit all devices: with `b` queries in total, each device receives
        `(b - q) · d` numbers of queries and `2 · (b - q) · count` numbers of results.
      implementation: `"reference"`, all similarities and a sort; `"tiled"`, one tile at a time,
        whose best are merged with the previous ones.
      query_tile: queries of a tile.
      tile: rows of a tile.

    Returns:
      The nearest of all devices' rows, without gradient.

    Raises:
      ValueError: for an unknown name, a count or tile below 1, or a label that int32 cannot hold.
      TypeError: for labels that are not integers, or vectors that are not arrays of floats.

    Example:
      >>> import jax.numpy as jnp
      >>> found = nearest(jnp.eye(2), jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), count=2)
      >>> found.rows.tolist(), found.similarities.tolist()
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
    ours, theirs = lax.stop_gradient(((queries, query_labels), (table, table_labels)))
    if axis_name is None:
        return _of_table(ours, theirs, jnp.int32(0), count, query_tile, tile)
    everyone = jax.tree.map(lambda leaf: lax.all_gather(leaf, axis_name, tiled=True), ours)
    first = lax.axis_index(axis_name) * table.shape[0]
    here = _of_table(everyone, theirs, first, count, query_tile, tile)
    # [devices, q, count] each: the results of every device for this one's queries. Devices are in
    # the order of their rows, so that `_best` still resolves ties by row.
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
    """The nearest among this device's rows, whose numbers begin at `first`."""
    num_queries, num_rows = queries[0].shape[0], table[0].shape[0]
    height, width = _even(num_queries, query_tile), _even(num_rows, tile)

    def of_queries(start: Integer[Array, ""]) -> Nearest:
        ours = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, height), queries)

        def one_tile(number: Integer[Array, ""] | int, found: Nearest) -> Nearest:
            place = jnp.minimum(number * width, num_rows - width)
            theirs = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, place, width), table)
            rows = place + jnp.arange(width, dtype=jnp.int32)
            # The last tile starts earlier where tiles do not divide, so that all have one shape.
            # Rows that it shares with the previous tile are masked, or they would be found twice.
            more = _tile(ours, theirs, first + rows, rows >= number * width, count)
            return _best(_joined(found, more), count)

        nothing = Nearest(
            jnp.full((height, count), -jnp.inf, jnp.promote_types(ours[0].dtype, jnp.float32)),
            jnp.full((height, count), -1, jnp.int32),
        )
        start_of_loop = as_varying(nothing, (queries, table, first))
        return lax.fori_loop(0, -(-num_rows // width), one_tile, start_of_loop)

    starts = [min(start, num_queries - height) for start in range(0, num_queries, height)]
    found = lax.map(of_queries, as_varying(jnp.array(starts), queries))
    # The last block of queries starts earlier, too; only its new queries are appended.
    new = num_queries - height * (len(starts) - 1)
    return jax.tree.map(
        lambda leaf: jnp.concatenate([leaf[:-1].reshape(-1, count), leaf[-1, height - new :]]),
        found,
    )


def _even(size: int, tile: int) -> int:
    """The smallest tile with the same number of tiles, in whole groups if possible."""
    least = -(-size // -(-size // tile))
    return min(-(-least // _GROUP) * _GROUP, tile, size)


def _tile(queries: PyTree, table: PyTree, rows: Array, new: Array, count: int) -> Nearest:
    vectors, labels = queries
    scale = jnp.ones(vectors.shape[0], jnp.promote_types(vectors.dtype, jnp.float32))
    similarities, counted = pair_scores(
        PairQueries(vectors, scale, labels), PairKeys(table[0], None, table[1]), hardness=0.0
    )
    # `top_k` sorts −0 below 0: a tie that the order of rows must decide.
    similarities = jnp.where(similarities == 0, 0, similarities)
    # `top_k` sorts NaN above all numbers.
    counted &= new[None] & jnp.isfinite(similarities)
    similarities = jnp.where(counted, similarities, -jnp.inf)
    return _best(_candidates(similarities, rows, count), min(count, rows.shape[0]))


def _candidates(similarities: Float[Array, "q k"], rows: Array, count: int) -> Nearest:
    """A part of a tile that contains its best columns, in the order of rows, and is fast to sort.

    The best `count` columns lie in the `count` groups with the greatest maxima: each member of
    another group ranks after all of these. Ties between maxima keep the groups with the lowest
    rows.
    """
    num_queries, width = similarities.shape
    num_groups = -(-width // _GROUP)
    if num_groups <= 2 * count:  # the groups would hold more than half of the tile
        return Nearest(similarities, jnp.broadcast_to(rows, similarities.shape))
    missing = num_groups * _GROUP - width
    filled = jnp.pad(similarities, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    groups = filled.reshape(num_queries, num_groups, _GROUP)
    _, best = lax.top_k(groups.max(2), count)
    best = jnp.sort(best, axis=1)  # back in the order of rows, on which ties depend
    chosen = jnp.take_along_axis(groups, best[:, :, None], axis=1)
    grouped_rows = jnp.pad(rows, (0, missing)).reshape(num_groups, _GROUP)
    return Nearest(chosen.reshape(num_queries, -1), grouped_rows[best].reshape(num_queries, -1))


def _joined(found: Nearest, more: Nearest) -> Nearest:
    return jax.tree.map(lambda ours, theirs: jnp.concatenate([ours, theirs], 1), found, more)


def _best(candidates: Nearest, count: int) -> Nearest:
    """The best of the candidates; those with equal similarities must be in the order of rows."""
    # `top_k` returns the first of equals.
    similarities, places = lax.top_k(candidates.similarities, count)
    rows = jnp.take_along_axis(candidates.rows, places, axis=1)
    return Nearest(similarities, jnp.where(similarities > -jnp.inf, rows, -1))
