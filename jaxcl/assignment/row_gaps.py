"""Loss gaps per row: softmax sums of sampled batches' rows, inside and outside their batch."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.nearest import nearest
from jaxcl.ops.pairs import Labels, PairLabels, pair_logsumexp
from jaxcl.ops.pairs.reductions import log_add_exp
from jaxcl.ops.row_tables import fetch_rows
from jaxcl.ops.vectors import inner_product, inner_products, normalise
from jaxcl.typing import Array, AxisName, Float, Int, Key, Scalar

__all__ = ["GapOptions", "RowGaps", "row_gaps"]

_NEIGHBOURS = 10
_BLOCK_ROWS = 256  # rows compared with the whole batch at a time, to count near duplicates


class GapOptions(NamedTuple):
    """The options of `measure_gap`, as documented there."""

    num_rows: int
    axis_name: AxisName | None = None
    near_duplicate: float = 0.95
    rows_per_batch: int | None = None


class RowGaps(NamedTuple):
    """The `GapReport` values of each measured row, batch by batch.

    Attributes:
      train_loss: the loss in the row's batch.
      gap: the loss over all rows minus `train_loss`.
      random_gap: the gap in a batch of random rows.
      bound: an upper bound of the gap.
      neighbours: the share of the row's nearest neighbours that are in its batch.
      near_duplicates: the number of near duplicates of the row in its batch.
    """

    train_loss: Float[Array, " q"]
    gap: Float[Array, " q"]
    random_gap: Float[Array, " q"]
    bound: Float[Array, " q"]
    neighbours: Float[Array, " q"]
    near_duplicates: Float[Array, " q"]


def row_gaps(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    rows: Int[Array, "batches b"],
    different: tuple[Labels, ...],
    options: GapOptions,
    *,
    temperature: float | Scalar,
    key: Key[Array, ""],
) -> RowGaps:
    """Measure each row separately; `measure_gap` takes the means and documents the arguments.

    Returns:
      The measured rows of this device's batches. The last devices have padding rows if batches do
      not divide over the devices.
    """
    num_rows, axis_name, near_duplicate, rows_per_batch = options
    if rows.size > num_rows:
        raise ValueError(
            f"the batches have {rows.size} rows in all, the data set {num_rows}; sample fewer, so "
            "that each row is in at most one"
        )
    if rows_per_batch is not None and rows_per_batch < 1:
        raise ValueError(f"rows_per_batch={rows_per_batch}; measure at least 1, or None for all")
    batch_size = rows.shape[1]
    table = _table(queries, keys, rows, different, axis_name)
    fetch = functools.partial(fetch_rows, table, axis_name=axis_name, constant=True)
    random_rows = jax.random.permutation(key, num_rows)[: rows.size].reshape(rows.shape)
    log_sums = functools.partial(_log_sums, temperature=temperature)

    def of_batch(batch: tuple[_Rows, _Rows]) -> tuple[_Rows, Array, Array, Array]:
        peers, strangers = batch
        anchors = jax.tree.map(lambda leaf: leaf[:rows_per_batch], peers)
        own = log_sums(anchors, peers, _labels(anchors, anchors.ids), _labels(peers, peers.ids))
        # Compare every row with exactly b - 1 random rows: all strangers except the last. A row
        # that is itself a stranger has label 1, and the last, of label 0, replaces it.
        among = jnp.isin(anchors.ids, strangers.ids[:-1]).astype(jnp.int32)
        spare = jnp.full(batch_size, -1, jnp.int32).at[-1].set(0)
        labels = _labels(anchors, anchors.ids, among), _labels(strangers, strangers.ids, spare)
        random = log_sums(anchors, strangers, *labels)
        return anchors, own, random, _near_duplicates(anchors, peers, near_duplicate)

    batches = fetch(_share(rows, axis_name)), fetch(_share(random_rows, axis_name))
    anchors, own, random, near_duplicates = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lax.map(of_batch, batches)
    )
    valid = table.ids < num_rows
    outside = _labels(anchors, anchors.batch), _labels(table, table.batch, valid=valid)
    missing = log_sums(anchors, table, *outside, axis_name=axis_name)
    hardest = _greatest(anchors, table, *outside, axis_name=axis_name)
    neighbours = nearest(
        jnp.concatenate([anchors.queries, anchors.keys], 1),
        jnp.concatenate([table.keys, table.queries], 1),
        count=_NEIGHBOURS,
        query_labels=_labels(anchors, anchors.ids),
        table_labels=_labels(table, table.ids, valid=valid),
        axis_name=axis_name,
    ).rows
    neighbour_batch = fetch_rows(table.batch, neighbours, axis_name=axis_name, constant=True)
    present = neighbours >= 0  # missing rows were fetched as batch 0
    inside = present & (neighbour_batch == anchors.batch[:, None])

    positives = inner_product(anchors.queries, anchors.keys)[:, None] / temperature
    in_batch, in_random = log_add_exp(positives, own), log_add_exp(positives, random)
    others = math.log(num_rows - batch_size) if num_rows > batch_size else -math.inf
    return RowGaps(
        # Softplus where one sum contains the other: a difference of log-sums would round away small
        # losses and gaps.
        train_loss=jax.nn.softplus(own - positives).mean(1),
        gap=jax.nn.softplus(missing - in_batch).mean(1),
        random_gap=(log_add_exp(in_batch, missing) - in_random).mean(1),
        bound=jax.nn.softplus(others + hardest / temperature - in_batch).mean(1),
        neighbours=inside.sum(1) / jnp.maximum(present.sum(1), 1),
        near_duplicates=near_duplicates.astype(positives.dtype),
    )


class _Rows(NamedTuple):
    """Pairs with their labels.

    Attributes:
      queries: embeddings of the queries.
      keys: embeddings of their keys.
      ids: row numbers in the whole data set.
      batch: the sampled batch of each row; −1 for none.
      different: labels that must all differ between negatives.
    """

    queries: Float[Array, "*r d"]
    keys: Float[Array, "*r d"]
    ids: Int[Array, "*r"]
    batch: Int[Array, "*r"]
    different: tuple[Array, ...]


def _table(
    queries: Array, keys: Array, rows: Array, different: tuple, axis_name: AxisName | None
) -> _Rows:
    """Collect this device's rows and their labels."""
    here = queries.shape[0]
    first = 0 if axis_name is None else lax.axis_index(axis_name) * here
    index = rows - first
    # Rows of other devices go past the end, where the scatter drops them; negative indices would
    # count from the end.
    index = jnp.where((index >= 0) & (index < here), index, here)
    numbers = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    batch = jnp.full(here, -1, jnp.int32).at[index].set(numbers, mode="drop")
    ids = first + jnp.arange(here, dtype=jnp.int32)
    return _Rows(*lax.stop_gradient((queries, keys)), ids, batch, different)


def _share(rows: Int[Array, "batches b"], axis_name: AxisName | None) -> Int[Array, "_ b"]:
    """Select this device's batches, padded with batches of missing rows."""
    if axis_name is None:
        return rows
    size = lax.axis_size(axis_name)
    per_device = -(-rows.shape[0] // size)
    missing = per_device * size - rows.shape[0]
    padded = jnp.pad(rows, ((0, missing), (0, 0)), constant_values=-1)
    return lax.dynamic_slice_in_dim(padded, lax.axis_index(axis_name) * per_device, per_device)


def _labels(rows: _Rows, *more: Array, valid: Array | None = None) -> PairLabels:
    return PairLabels(different=(*more, *rows.different), valid=valid)


def _log_sums(
    anchors: _Rows,
    candidates: _Rows,
    anchor_labels: PairLabels,
    candidate_labels: PairLabels,
    *,
    temperature: float | Scalar,
    axis_name: AxisName | None = None,
) -> Float[Array, "q 2"]:
    """The log-sum-exp of anchors' queries over candidates' keys, and of keys over queries."""

    def columns(anchor_vectors: Array, candidate_vectors: Array) -> Array:
        # Devices exchange the columns, so anchors are the columns, and the table's rows stay in
        # place.
        return pair_logsumexp(
            candidate_vectors,
            anchor_vectors,
            temperature=temperature,
            query_labels=candidate_labels,
            key_labels=anchor_labels,
            axis_name=axis_name,
        )[1]

    return _both_ways(columns, anchors, candidates)


def _greatest(
    anchors: _Rows,
    candidates: _Rows,
    anchor_labels: PairLabels,
    candidate_labels: PairLabels,
    *,
    axis_name: AxisName | None,
) -> Float[Array, "q 2"]:
    """The greatest similarity of anchors' queries to candidates' keys, and of keys to queries."""
    best = functools.partial(
        nearest,
        count=1,
        query_labels=anchor_labels,
        table_labels=candidate_labels,
        axis_name=axis_name,
    )
    return _both_ways(
        lambda queries, table: best(queries, table).similarities[:, 0], anchors, candidates
    )


def _both_ways(reduce: Callable[[Array, Array], Array], anchors: _Rows, candidates: _Rows) -> Array:
    return jnp.stack(
        [reduce(anchors.queries, candidates.keys), reduce(anchors.keys, candidates.queries)], 1
    )


def _near_duplicates(anchors: _Rows, batch: _Rows, threshold: float) -> Int[Array, " m"]:
    """Count each row's near duplicates, which have almost the same query or key, in its batch."""
    wide = jnp.promote_types(batch.queries.dtype, jnp.float32)
    sides = [normalise(side.astype(wide)) for side in (batch.queries, batch.keys)]
    num_anchors = anchors.ids.shape[0]  # anchors are the first rows of the batch

    def of_row(row: tuple[Array, list[Array]]) -> Array:
        number, vectors = row
        query, key = (
            inner_products(vector[None], side)[0] > threshold
            for vector, side in zip(vectors, sides, strict=True)
        )
        return ((query | key) & (batch.ids != number)).sum(dtype=jnp.int32)

    anchor_sides = [side[:num_anchors] for side in sides]
    return lax.map(of_row, (anchors.ids, anchor_sides), batch_size=_BLOCK_ROWS)
