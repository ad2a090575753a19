"""What an assignment does to the matrix of similarities, as a picture."""

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

_WINDOW = 16  # batches that are shown closely
_SEEN = 4  # cells of a batch from which on its outline hides nothing


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
    """Writes a PNG of the similarities between rows, in the order before beside that after.

    All whole batches, and above them the first 16 closely, if there are more. Brighter is more
    similar, on one scale. What is bright inside of the outlines is what rows of a batch learn from;
    what is bright outside they do not meet. Rows' own keys are left out: these are the negatives.

    Every process calls it, and the first writes.

    Args:
      queries: of all rows, in the order of their numbers; sharded or not.
      keys: theirs.
      before: row numbers, one batch after the other, such as the data's own order.
      after: as many as assigned.
      batch_size: of the batches.
      path: the file, which is there whole or not at all.
      cells: along a side of each picture, at most. A cell is the mean of many pairs, and costs no
        more than a sum of vectors.

    Raises:
      ValueError: if there is no whole batch, no pair in one or no cell, or if the orders differ in
        length.
    """
    if not 2 <= batch_size <= len(before) == len(after) or cells < 1:
        raise ValueError(
            f"orders of {len(before)} and {len(after)} rows, batch_size={batch_size}, "
            f"cells={cells}; give two orders of one length, of a batch at least, batches of at "
            "least two rows, and a cell"
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
    everywhere = _mean_in_batches(queries, keys, orders[0], 1)
    if jax.process_index() == 0:
        title = (
            f"Similarity of queries to the keys of others: {len(orders[0]):,} rows in batches of "
            f"{batch_size:,}\n"
            f"Mean within a batch {means[0]:.3f} before, {means[1]:.3f} after; "
            f"of any two rows {everywhere:.3f}"
        )
        write_whole(path, _drawn(panels, title))


def coarse_similarity(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    order: Integer[np.ndarray, " r"],
    *,
    cells: int,
) -> Float[np.ndarray, "c c"]:
    r"""The mean similarity of each run of rows to each, own pairs left out.

    The mean over two runs is the product of their mean vectors,

    $$\frac{1}{|A| |B|} \sum_{i \in A} \sum_{j \in B} \langle q_i, k_j\rangle
    = \Big\langle \frac{1}{|A|} \sum_{i \in A} q_i, \frac{1}{|B|} \sum_{j \in B} k_j\Big\rangle,$$

    so that no pair is looked at by itself.

    Args:
      queries: of all rows.
      keys: theirs.
      order: the rows that are looked at, cut into `cells` runs as equal as can be.
      cells: how many; at most as many as rows.

    Returns:
      A line per run of queries, a column per run of keys; NaN on the diagonal where a run is one
      row, which has no pair but its own.

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
      queries: of vectors.
      keys: of vectors.
      own: of rows' similarities to their own keys.
      sizes: how many rows.
    """

    queries: Float[np.ndarray, "c d"]
    keys: Float[np.ndarray, "c d"]
    own: Float[np.ndarray, " c"]
    sizes: Float[np.ndarray, " c"]


def _runs(queries: Array, keys: Array, order: Integer[np.ndarray, " r"], count: int) -> _Runs:
    run = np.full(queries.shape[0], count, np.int32)  # a run that is none
    run[order] = np.arange(len(order), dtype=np.int64) * count // len(order)
    return _Runs(*(fetch(part).astype(np.float64) for part in _sums(queries, keys, run, count)))


@functools.partial(jax.jit, static_argnums=3)
def _sums(queries: Array, keys: Array, run: Array, count: int) -> tuple[Array, ...]:
    """Where the rows are, so that no table travels."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    queries, keys = queries.astype(wide), keys.astype(wide)
    parts = queries, keys, (queries * keys).sum(1), jnp.ones(run.shape, wide)
    return tuple(jax.ops.segment_sum(part, run, count) for part in parts)


def _mean_in_batches(
    queries: Array, keys: Array, order: Integer[np.ndarray, " r"], num_batches: int
) -> float:
    """The mean similarity of a query to the other rows' keys of its batch."""
    runs = _runs(queries, keys, order, num_batches)
    similarities = (runs.queries * runs.keys).sum() - runs.own.sum()
    return float(similarities / (runs.sizes * (runs.sizes - 1)).sum())


def _cells(num_batches: int, batch_size: int, *, most: int) -> int:
    """As many as fit of each batch, of two rows at least, so that each holds a pair."""
    per_batch = min(most // num_batches, batch_size // 2)
    return per_batch * num_batches or most


class _Panel(NamedTuple):
    similarities: Float[np.ndarray, "c c"]
    batches: int
    title: str


def _drawn(panels: list[_Panel], title: str) -> bytes:
    """The file's content."""
    # Here, since it takes a second; and without pyplot, whose state is everyone's.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    values = np.concatenate([panel.similarities.ravel() for panel in panels])
    low, high = np.nanquantile(values, [0.001, 0.999])
    lines = len(panels) // 2
    figure = Figure(figsize=(10.4, 1 + 4.6 * lines), dpi=150, layout="compressed")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(lines, 2)
    for axes, panel in zip(grid.ravel(), panels, strict=True):
        image = axes.imshow(
            panel.similarities,
            cmap="viridis",  # in even steps for those, too, who see fewer colours
            vmin=low,
            vmax=high,
            extent=(0, panel.batches, panel.batches, 0),
            interpolation="nearest",
        )
        axes.set_title(panel.title, fontsize=10)
        axes.set(xlabel="batch of the key", ylabel="batch of the query")
        axes.locator_params(integer=True)
        if len(panel.similarities) < _SEEN * panel.batches:
            continue
        for colour, width in (("black", 2.2), ("white", 0.9)):  # seen on dark and on bright cells
            for batch in range(panel.batches):
                corner = batch, batch
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, lw=width))
    figure.colorbar(image, ax=grid, shrink=0.6, extend="both", label="mean similarity of a cell")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
