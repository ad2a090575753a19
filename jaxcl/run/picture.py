"""Draw the matrix of similarities between rows, before and after an assignment of batches."""

import functools
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.host.files import write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.ops.mesh import fetch
from jaxcl.typing import Array, Float, Integer

__all__ = ["coarse_similarity", "similarity_picture"]

_WINDOW = 16  # number of batches in the enlarged pictures
_OUTLINED_CELLS = 4  # batches with fewer cells have no outline, which would hide them


def similarity_picture(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    before: Integer[np.ndarray, " r"],
    after: Integer[np.ndarray, " _"],
    *,
    batch_size: int,
    path: AnyPath,
    cells: int = 256,
) -> None:
    """Write a PNG of the similarities between rows in two orders, side by side.

    The picture shows all whole batches and, above them, an enlarged view of the first 16 if there
    are more. Brighter cells are more similar, on one scale. Squares outline the batches: their rows
    learn only from the negatives inside. The similarities of rows to their own keys are left out.

    Every process must call this function; process 0 writes the file.

    Args:
      queries: embeddings of all rows, in the order of their numbers; sharded or not.
      keys: embeddings of the keys of the same rows.
      before: row numbers, batch by batch, such as in the order of the data.
      after: row numbers in the order of the assignment; as many as in `before`.
      batch_size: number of rows per batch.
      path: the file to write, completely or not at all.
      cells: largest number of cells along a side of each picture. A cell is the mean of many pairs,
        but costs no more than a sum of vectors.

    Raises:
      ValueError: if there is no whole batch or no cell, a batch has only one row, or the orders
        differ in length.
    """
    if not 2 <= batch_size <= len(before) == len(after) or cells < 1:
        raise ValueError(
            f"orders of {len(before)} and {len(after)} rows, batch_size={batch_size} and "
            f"cells={cells} do not fit; give two orders of the same length, at least one batch, at "
            "least two rows per batch, and at least one cell"
        )
    num_batches = len(before) // batch_size
    orders = [order[: num_batches * batch_size] for order in (before, after)]
    views = sorted({min(num_batches, _WINDOW), num_batches})
    panels = [
        _Panel(
            coarse_similarity(
                queries,
                keys,
                order[: view * batch_size],
                cells=_cells(view, batch_size, most=cells),
            ),
            batches=view,
            title=f"{name}, {'all' if view == num_batches else 'first'} {view:,} batches",
        )
        for view in views
        for name, order in zip(("before", "after"), orders, strict=True)
    ]
    means = [_mean_in_batches(queries, keys, order, num_batches) for order in orders]
    overall_mean = _mean_in_batches(queries, keys, orders[0], 1)
    if jax.process_index() == 0:
        title = (
            f"Similarity of queries to the keys of other rows: {len(orders[0]):,} rows in batches "
            f"of {batch_size:,}\n"
            f"Mean within batches {means[0]:.3f} before, {means[1]:.3f} after; "
            f"over all rows {overall_mean:.3f}"
        )
        write_whole(path, _draw(panels, title))


def coarse_similarity(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    order: Integer[np.ndarray, " r"],
    *,
    cells: int,
) -> Float[np.ndarray, "c c"]:
    r"""Compute the mean similarity between runs of consecutive rows of an order.

    The similarities of rows to their own keys are left out. The mean over two runs is the inner
    product of their mean vectors,

    $$\frac{1}{|A| |B|} \sum_{i \in A} \sum_{j \in B} \langle q_i, k_j\rangle
    = \Big\langle \frac{1}{|A|} \sum_{i \in A} q_i, \frac{1}{|B|} \sum_{j \in B} k_j\Big\rangle,$$

    so that single pairs need not be computed.

    Args:
      queries: embeddings of all rows.
      keys: embeddings of the keys of the same rows.
      order: row numbers, to be divided into `cells` runs of almost equal length.
      cells: number of runs, at most the number of rows.

    Returns:
      A matrix with a row per run of queries and a column per run of keys. The diagonal is NaN for
      runs of one row, which have no pair except its own.

    Example:
      >>> import jax.numpy as jnp
      >>> sides = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
      >>> coarse_similarity(sides, sides, np.array([0, 2, 1, 3]), cells=2).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    runs = _runs(queries, keys, order, cells)
    similarities = runs.queries @ runs.keys.T - np.diag(runs.own)
    pairs = np.outer(runs.sizes, runs.sizes) - np.diag(runs.sizes)
    return np.where(pairs > 0, similarities / np.maximum(pairs, 1), np.nan)


class _Runs(NamedTuple):
    """Sums over each run of rows.

    Attributes:
      queries: sums of the query vectors.
      keys: sums of the key vectors.
      own: sums of the similarities of rows to their own keys.
      sizes: numbers of rows.
    """

    queries: Float[np.ndarray, "c d"]
    keys: Float[np.ndarray, "c d"]
    own: Float[np.ndarray, " c"]
    sizes: Float[np.ndarray, " c"]


def _runs(queries: Array, keys: Array, order: Integer[np.ndarray, " r"], count: int) -> _Runs:
    run = np.full(queries.shape[0], count, np.int32)  # rows outside the order are in no run
    run[order] = np.arange(len(order), dtype=np.int64) * count // len(order)
    return _Runs(*(fetch(part).astype(np.float64) for part in _sums(queries, keys, run, count)))


@functools.partial(jax.jit, static_argnums=3)
def _sums(queries: Array, keys: Array, run: Array, count: int) -> tuple[Array, ...]:
    """Sum on the devices that hold the rows, so that only the sums are transferred."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    queries, keys = queries.astype(wide), keys.astype(wide)
    parts = queries, keys, (queries * keys).sum(1), jnp.ones(run.shape, wide)
    return tuple(jax.ops.segment_sum(part, run, count) for part in parts)


def _mean_in_batches(
    queries: Array, keys: Array, order: Integer[np.ndarray, " r"], num_batches: int
) -> float:
    """The mean similarity of a query to the keys of the other rows in its batch."""
    runs = _runs(queries, keys, order, num_batches)
    similarities = (runs.queries * runs.keys).sum() - runs.own.sum()
    return float(similarities / (runs.sizes * (runs.sizes - 1)).sum())


def _cells(num_batches: int, batch_size: int, *, most: int) -> int:
    """The number of cells: as many per batch as fit, each with at least two rows and so a pair."""
    per_batch = min(most // num_batches, batch_size // 2)
    return per_batch * num_batches or most


class _Panel(NamedTuple):
    similarities: Float[np.ndarray, "c c"]
    batches: int
    title: str


def _draw(panels: list[_Panel], title: str) -> bytes:
    """Draw the panels, and return the content of the PNG file."""
    # Imported here, since it takes a second, and without pyplot, which has global state.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    values = np.concatenate([panel.similarities.ravel() for panel in panels])
    low, high = np.nanquantile(values, [0.001, 0.999])
    num_rows = len(panels) // 2
    figure = Figure(figsize=(10.4, 1 + 4.6 * num_rows), dpi=150, layout="compressed")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(num_rows, 2)
    for axes, panel in zip(grid.ravel(), panels, strict=True):
        image = axes.imshow(
            panel.similarities,
            cmap="viridis",  # also suitable for colour-blind readers
            vmin=low,
            vmax=high,
            extent=(0, panel.batches, panel.batches, 0),
            interpolation="nearest",
        )
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel="batch of the key", ylabel="batch of the query")
        axes.locator_params(integer=True)
        if len(panel.similarities) < _OUTLINED_CELLS * panel.batches:
            continue
        for colour, width in (("black", 2.2), ("white", 0.9)):  # visible on dark and bright cells
            for batch in range(panel.batches):
                corner = batch, batch
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, lw=width))
    figure.colorbar(image, ax=grid, shrink=0.6, extend="both", label="mean similarity of a cell")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
