r"""The gap between the loss in assigned batches and the loss over the whole data set.

A row's train loss sums over the rows of its batch; its global loss sums over all rows. The gap
$\log Z_\text{all} - \log Z_\text{batch} \ge 0$ is the part of the loss that the batch misses.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxcl.assignment.row_gaps import GapOptions, row_gaps
from jaxcl.ops.arguments import as_integers, as_labels, as_vectors, check_numbers
from jaxcl.ops.mesh import batch_sharding, current_mesh, on_mesh
from jaxcl.ops.pairs import Labels
from jaxcl.typing import Array, AxisName, Float, Int, Integer, Key, Range, Scalar

__all__ = [
    "GapMeasure",
    "GapReport",
    "make_gap_measure",
    "measure_gap",
    "sample_batches",
]


class GapReport(NamedTuple):
    """Gaps of the measured rows of some batches, in nats unless stated otherwise.

    Attributes:
      global_loss: mean loss with all rows of the data set as negatives, over both directions.
      train_loss: mean loss with the rows of the batch as negatives.
      gap: `global_loss` minus `train_loss`.
      gap_p99: the 99th percentile of the rows' gaps.
      gap_max: the greatest gap.
      random_gap: the mean gap of the same rows in batches of random rows.
      closed: the share of `random_gap` that the batches close; below 0 if they are worse than
        random batches.
      bound: the mean upper bound of a row's gap, from the most similar row outside its batch. It is
        loose if few other rows outside the batch are as similar.
      neighbours: the share of each row's ten nearest neighbours that are in its batch.
      near_duplicates: pairs of rows with almost the same query or key, per batch; an estimate if
        `rows_per_batch` is set.
    """

    global_loss: Scalar
    train_loss: Scalar
    gap: Scalar
    gap_p99: Scalar
    gap_max: Scalar
    random_gap: Scalar
    closed: Scalar
    bound: Scalar
    neighbours: Scalar
    near_duplicates: Scalar


GapMeasure = Callable[..., GapReport]
"""`(queries, keys, rows, temperature, key, different=()) -> GapReport`, for arrays on a mesh."""


def sample_batches(
    order: Integer[np.ndarray, " n"], *, batch_size: int, count: int, seed: int
) -> Int[np.ndarray, "batches b"]:
    """Sample whole batches of an order, or return all of them if there are at most `count`.

    Rows after the last whole batch are left out.

    Raises:
      ValueError: if a size is below 1, or the order is shorter than a batch.

    Example:
      >>> sample_batches(np.array([4, 2, 0, 1, 3]), batch_size=2, count=5, seed=0).tolist()
      [[4, 2], [0, 1]]
    """
    if batch_size < 1 or count < 1:
        raise ValueError(f"batch_size={batch_size} and count={count} must be at least 1")
    order = as_integers("order", order)
    num_batches = len(order) // batch_size
    if num_batches < 1:
        raise ValueError(
            f"an order of {len(order)} rows has no whole batch of {batch_size}; use a smaller "
            "batch_size"
        )
    batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)
    chosen = np.random.default_rng(seed).permutation(num_batches)[:count]
    return batches[np.sort(chosen)].astype(np.int32)


def measure_gap(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    rows: Int[Array, "batches b"],
    *,
    temperature: float | Scalar,
    key: Key[Array, ""],
    num_rows: int,
    axis_name: AxisName | None = None,
    different: tuple[Labels, ...] = (),
    near_duplicate: float = 0.95,
    rows_per_batch: int | None = None,
) -> GapReport:
    r"""Measure the gap of some batches in both directions, without a full matrix of scores.

    With $s_{ij} = \langle x_i, y_j\rangle / \tau$ and $B_i$ the batch of row $i$,

    $$g_i = \tfrac12 \Big(\log \frac{\sum_j e^{s_{ij}}}{\sum_{j \in B_i} e^{s_{ij}}}
    + \log \frac{\sum_j e^{s_{ji}}}{\sum_{j \in B_i} e^{s_{ji}}}\Big).$$

    Let $m_i$ be the greatest similarity among the $N - b$ rows outside the batch, and $Z_i$ the sum
    over the batch. Each half is then at most `bound`, $\log(1 + (N - b) e^{m_i / \tau} / Z_i)$.

    Args:
      queries: this device's rows of the data set, in the order of their numbers.
      keys: the keys of these rows.
      rows: the batches' row numbers, each at most once; equal on all devices.
      temperature: $\tau > 0$, the temperature of the loss.
      key: draws the rows of random batches; equal on all devices.
      num_rows: rows of the data set; later rows are padding.
      axis_name: mesh axes of an enclosing `jax.shard_map` over which rows are sharded. Only the
        rows of the batches are sent to other devices.
      different: this device's labels; two rows are each other's negatives only if all their labels
        differ, as in `jaxcl.ops.pairs`. A row is its own positive whatever its labels.
      near_duplicate: the cosine of two queries, or of two keys, above which two rows of a batch are
        near duplicates.
      rows_per_batch: measure only the first rows of each batch, against the whole batch; `None` to
        measure all.

    Returns:
      The report, equal on all devices.

    Raises:
      ValueError: if the batches have more rows than the data set, or `rows_per_batch` is below 1.

    Reference:
      Sachidananda, Yang and Zhu, "Global Selection of Contrastive Batches via Optimization on
      Sample Permutations", ICML 2023, bound the gap in the same way and assign batches to lower
      the bound.
    """
    queries, keys = as_vectors("queries", queries), as_vectors("keys", keys)
    check_numbers("temperature", temperature, Range(above=0))
    check_numbers("near_duplicate", near_duplicate, Range())
    options = GapOptions(num_rows, axis_name, near_duplicate, rows_per_batch)
    by_row = row_gaps(queries, keys, rows, different, options, temperature=temperature, key=key)
    if axis_name is not None:
        everyone = functools.partial(
            lax.all_gather, axis_name=axis_name, tiled=True, to="invarying"
        )
        by_row = jax.tree.map(everyone, by_row)
    # Padding batches come last; drop them, since they would bias the means and the maximum.
    num_batches, batch_size = rows.shape
    measured = num_batches * min(batch_size, rows_per_batch or batch_size)
    by_row = jax.tree.map(lambda leaf: leaf[:measured], by_row)
    mean = jax.tree.map(jnp.mean, by_row)
    least = jnp.finfo(mean.gap.dtype).tiny  # avoids 0 / 0 if one batch holds all rows
    return GapReport(
        global_loss=mean.train_loss + mean.gap,
        train_loss=mean.train_loss,
        gap=mean.gap,
        gap_p99=jnp.quantile(by_row.gap, 0.99),
        gap_max=by_row.gap.max(),
        random_gap=mean.random_gap,
        closed=1 - mean.gap / jnp.maximum(mean.random_gap, least),
        bound=mean.bound,
        neighbours=mean.neighbours,
        near_duplicates=mean.near_duplicates * batch_size / 2,  # each pair is counted twice
    )


def make_gap_measure(
    mesh: Mesh,
    *,
    num_rows: int,
    near_duplicate: float = 0.95,
    rows_per_batch: int | None = None,
    fields: Sequence[str] = GapReport._fields,
) -> GapMeasure:
    """Compile `measure_gap` for embeddings that are sharded over a mesh.

    Args:
      mesh: the devices that hold the embeddings.
      num_rows: rows of the data set; the tables may be padded to divide over the mesh.
      near_duplicate: the cosine above which rows are near duplicates.
      rows_per_batch: the number of rows to measure in each batch; `None` for all.
      fields: the fields of the report to compute. All others are NaN and cost nothing: without
        `bound` and `neighbours`, a call takes a third of the time.

    Returns:
      `(queries, keys, rows, temperature, key, different=()) -> GapReport`.

    Raises:
      ValueError: if a field is unknown.
    """
    if unknown := set(fields) - set(GapReport._fields):
        known = ", ".join(GapReport._fields)
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}; use {known}")
    compiled = _compiled_gap(
        mesh,
        fields,
        num_rows=num_rows,
        near_duplicate=near_duplicate,
        rows_per_batch=rows_per_batch,
    )

    def measure(
        queries: Float[Array, "n d"],
        keys: Float[Array, "n d"],
        rows: Int[Array, "batches b"],
        temperature: float | Scalar,
        key: Key[Array, ""],
        different: tuple[Labels, ...] = (),
    ) -> GapReport:
        # `jit` would silently truncate 64-bit labels.
        queries, keys = as_vectors("queries", queries), as_vectors("keys", keys)
        check_numbers("temperature", temperature, Range(above=0))
        labels = tuple(as_labels("different", label) for label in different)
        # Fields not computed are NaN, which `jax_debug_nans` would report.
        with current_mesh(mesh), jax.debug_nans(False):
            sides = jax.device_put((queries, keys, labels), batch_sharding(mesh))
            others = on_mesh((rows, temperature, key), mesh)
            return compiled(*sides[:2], *others, sides[2])

    return measure


def _compiled_gap(mesh: Mesh, fields: Sequence[str], **options: Any) -> Callable[..., GapReport]:
    """Jit `measure_gap` over a mesh, with NaN for all fields except `fields`."""
    by_row, replicated = PartitionSpec(mesh.axis_names), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(by_row, by_row, replicated, replicated, replicated, by_row),
        out_specs=replicated,
    )
    def measured(
        queries: Array,
        keys: Array,
        rows: Array,
        temperature: Array,
        key: Array,
        different: tuple[Labels, ...],
    ) -> GapReport:
        return measure_gap(
            queries,
            keys,
            rows,
            temperature=temperature,
            key=key,
            axis_name=mesh.axis_names,
            different=different,
            **options,
        )

    @jax.jit
    def compiled(*arguments: Any) -> GapReport:
        # Overwritten inside `jit`, so that XLA removes the work for the unwanted fields.
        report = measured(*arguments)
        unwanted = {name: jnp.full((), jnp.nan) for name in GapReport._fields if name not in fields}
        return report._replace(**unwanted)

    return compiled
