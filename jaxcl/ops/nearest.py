"""The nearest rows of a sharded table, exactly, without a matrix of queries and rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.pairs.sides import ALL_COUNT, PairKeys, PairLabels, PairQueries, pair_scores
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Float, Int, Integer, PyTree

__all__ = ["IMPLEMENTATIONS", "QUERY_TILE", "TILE", "Nearest", "nearest"]

IMPLEMENTATIONS = ("reference", "tiled")

QUERY_TILE, TILE = 256, 65_536
"""Queries and rows of a tile: 64 MiB of float32 similarities. Wide, since each is sorted once."""

_GROUP = 32  # columns of which the greatest is looked at first


class Nearest(NamedTuple):
    """The rows nearest to each query, the nearest first, and of equals the lowest row first.

    Attributes:
      similarities: inner products; −∞ where fewer rows than asked for count.
      rows: row numbers in the whole table; −1 there.
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
      queries: of this device.
      table: this device's rows of the table.
      count: how many are wanted, at least 1.
      query_labels: the queries' part in which rows count, as in `jaxcl.ops.pairs`.
      table_labels: the rows' part.
      axis_name: the mesh axes of an enclosing `jax.shard_map` over which both sides are sharded,
        row by row. All devices' queries visit every device's rows: with `b` queries in all,
        `(b - q) · d` numbers come in for them, and `2 · (b - q) · count` with what was found.
      implementation: `"reference"`, all similarities and a sort; `"tiled"`, a tile at a time, whose
        best are joined with those before.
      query_tile: queries of a tile.
      tile: rows of a tile.

    Returns:
      The nearest of all devices' rows; constants of the gradient.

    Raises:
      ValueError: for an unknown name, or a count or tile below 1.

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
    if implementation == "reference":
        query_tile, tile = queries.shape[0], table.shape[0]
    ours, theirs = lax.stop_gradient(((queries, query_labels), (table, table_labels)))
    if axis_name is None:
        return _of_table(ours, theirs, jnp.int32(0), count, query_tile, tile)
    everyone = jax.tree.map(lambda leaf: lax.all_gather(leaf, axis_name, tiled=True), ours)
    first = lax.axis_index(axis_name) * table.shape[0]
    here = _of_table(everyone, theirs, first, count, query_tile, tile)
    # [devices, q, count] of each: what every device has found for this one's queries, in the order
    # of devices, which is that of rows.
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
            # The last tile begins earlier if need be; what the one before has seen is not new.
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
    # The last block, too, begins earlier if need be; only what no other has counts.
    new = num_queries - height * (len(starts) - 1)
    return jax.tree.map(
        lambda leaf: jnp.concatenate([leaf[:-1].reshape(-1, count), leaf[-1, height - new :]]),
        found,
    )


def _even(size: int, tile: int) -> int:
    """The least tile that needs no more of them than this one, of whole groups where it has any."""
    least = -(-size // -(-size // tile))
    return min(-(-least // _GROUP) * _GROUP, tile, size)


def _tile(queries: PyTree, table: PyTree, rows: Array, new: Array, count: int) -> Nearest:
    vectors, labels = queries
    scale = jnp.ones(vectors.shape[0], jnp.promote_types(vectors.dtype, jnp.float32))
    similarities, counted = pair_scores(
        PairQueries(vectors, scale, labels), PairKeys(table[0], None, table[1]), hardness=0.0
    )
    similarities = jnp.where(similarities == 0, 0, similarities)  # −0 is no less than 0
    similarities = jnp.where(counted & new, similarities, -jnp.inf)
    return _best(_candidates(similarities, rows, count), min(count, rows.shape[0]))


def _candidates(similarities: Float[Array, "q k"], rows: Array, count: int) -> Nearest:
    """A part of a tile that holds its best, in the order of rows: cheaper to sort than the whole.

    The best `count` lie in the `count` groups of columns with the greatest maxima: of a group left
    out, each member stands behind `count` others. Of equal maxima the first groups are kept, which
    are those of the lowest rows.
    """
    num_queries, width = similarities.shape
    num_groups = -(-width // _GROUP)
    if num_groups <= 2 * count:
        return Nearest(similarities, jnp.broadcast_to(rows, similarities.shape))
    missing = num_groups * _GROUP - width
    filled = jnp.pad(similarities, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    groups = filled.reshape(num_queries, num_groups, _GROUP)
    _, best = lax.top_k(groups.max(2), count)
    best = jnp.sort(best, axis=1)
    chosen = jnp.take_along_axis(groups, best[:, :, None], axis=1)
    grouped_rows = jnp.pad(rows, (0, missing)).reshape(num_groups, _GROUP)
    return Nearest(chosen.reshape(num_queries, -1), grouped_rows[best].reshape(num_queries, -1))


def _joined(found: Nearest, more: Nearest) -> Nearest:
    return jax.tree.map(lambda ours, theirs: jnp.concatenate([ours, theirs], 1), found, more)


def _best(candidates: Nearest, count: int) -> Nearest:
    """The best of candidates whose equals stand in the order of their rows."""
    similarities, places = lax.top_k(candidates.similarities, count)
    rows = jnp.take_along_axis(candidates.rows, places, axis=1)
    return Nearest(similarities, jnp.where(similarities > -jnp.inf, rows, -1))
