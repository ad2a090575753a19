"""Orders that keep neighbouring rows close: the paper's method, and a method for sparse graphs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee

from jaxcl.assignment.graph import PairGraph
from jaxcl.assignment.place import Place
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Bool, Float, Int, Integer

__all__ = ["cuthill_mckee", "paper_order"]

_NONE = int(np.iinfo(np.int32).max)


def paper_order(
    queries: Float[np.ndarray, "n d"],
    keys: Float[np.ndarray, "_ _"],
    *,
    quantile: float = 0.999,
    block: int = 2_048,
    sample: int = 2**24,
    seed: int = 0,
    advance: Callable[[int], object] = lambda rows: None,
) -> Int[np.ndarray, " n"]:
    r"""Order rows by Global Contrastive Batch Sampling; consecutive rows share a batch.

    Rows $i$ and $j$ are neighbours if $x_i \cdot y_j$ or $x_j \cdot y_i$ is above the quantile of
    all such products, and SciPy's reverse Cuthill–McKee brings neighbours close together. Unlike in
    the paper, a row's positive $x_i \cdot y_i$ is neither an edge nor part of the quantile. It says
    nothing about neighbours, and with up to 1 / (1 - quantile) rows, the positives alone could be
    all products above the quantile.

    Args:
      queries: one vector per pair; with unit length, products are the paper's cosines.
      keys: the key of each query.
      quantile: the share of products that are not edges. A row has `(1 - quantile) · n` edges on
        average: with the paper's value, 50 of 50,000 rows, or a thousand of a million.
      block: queries per block of products on the device. Device memory grows as block · n, host
        memory as the number of edges.
      sample: number of products used to estimate the quantile, which is exact if there are no more;
        otherwise it is taken over all products of randomly chosen queries.
      seed: draws these queries.
      advance: called after each block with its number of queries.

    Returns:
      Row numbers, int32. Products are in float32, and other kinds of devices may round differently.

    Raises:
      ValueError: if the shapes of queries and keys differ, the quantile is not between 0 and 1, or
        block or sample is below 1.

    Example:
      >>> topics = np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0, 1]]
      >>> order = paper_order(topics, topics, quantile=0.5)
      >>> (order % 2).tolist()
      [1, 1, 1, 0, 0, 0]

    Reference:
      Sachidananda, Yang and Zhu, "Global Selection of Contrastive Batches via Optimization on
      Sample Permutations", ICML 2023.
    """
    if queries.shape != keys.shape:
        raise ValueError(
            f"queries have the shape {queries.shape} and keys {keys.shape}; give both sides of the "
            "same pairs"
        )
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile} must be between 0 and 1, such as 0.999")
    if min(block, sample) < 1:
        raise ValueError(f"block={block}, sample={sample}; both must be at least 1")
    num_rows = len(queries)
    if num_rows < 2:
        return np.arange(num_rows, dtype=np.int32)
    x, y = (jnp.asarray(side, jnp.float32) for side in (queries, keys))
    threshold = _threshold(x, y, quantile, sample, seed)
    degrees, columns = [], []
    for first in range(0, num_rows, block):
        # Compare on the device, which transfers one byte per product to the host instead of four.
        above = np.asarray(_above(x[first : first + block], y, threshold))
        row, column = np.divmod(np.flatnonzero(above), num_rows)
        others = column != first + row
        degrees.append(np.bincount(row[others], minlength=len(above)))
        columns.append(column[others].astype(np.int32))
        advance(len(above))
    ends = np.concatenate(columns)
    starts = np.cumsum(np.concatenate([[0], *degrees]))
    edges = csr_matrix((np.ones(len(ends), bool), ends, starts), shape=(num_rows, num_rows))
    # Row i's edges come only from its query; with `symmetric_mode=False`, SciPy adds the transpose.
    return reverse_cuthill_mckee(edges, symmetric_mode=False).astype(np.int32)


def _threshold(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    quantile: float,
    sample: int,
    seed: int,
) -> np.floating:
    num_rows = len(queries)
    rows = np.arange(num_rows)
    if num_rows**2 > sample:
        rng = np.random.default_rng(seed)
        rows = rng.choice(num_rows, max(1, sample // num_rows), replace=False)
    products = np.asarray(_products(queries[rows], keys))
    others = products[rows[:, None] != np.arange(num_rows)]
    return np.quantile(others, quantile, overwrite_input=True)


@jax.jit
def _products(queries: Float[Array, "q d"], keys: Float[Array, "n d"]) -> Float[Array, "q n"]:
    # Full float32: the default precision of accelerators would move products across the threshold.
    return jnp.dot(queries, keys.T, precision=lax.Precision.HIGHEST)


@jax.jit
def _above(
    queries: Float[Array, "q d"], keys: Float[Array, "n d"], threshold: Float[Array, ""]
) -> Bool[Array, "q n"]:
    return _products(queries, keys) > threshold


def cuthill_mckee(
    graph: PairGraph,
    *,
    num_rows: int | Integer[Array | np.ndarray, ""],
    axis_name: AxisName | None = None,
) -> Int[Array, " n"]:
    """Reverse Cuthill–McKee on the neighbour graph, level by level, for use in `jax.jit`.

    The traversal is breadth first from a row of minimum degree. Within a level, rows are ordered by
    (their earliest neighbour in the previous level, degree, row number). Then the order is
    reversed. Each component starts at its row of minimum degree, and components are ordered by that
    degree, as in the sequential algorithm. All components are traversed in parallel, so that the
    number of iterations is the depth of the deepest one.

    Args:
      graph: the neighbours of this device's rows; edges are undirected. The degree is the number of
        edges to and from a row, so that mutual neighbours add two. SciPy adds one, which would
        require the neighbour lists of other devices.
      num_rows: rows on all devices; later rows are padding, and come last.
      axis_name: mesh axes of an enclosing `jax.shard_map` over which rows are sharded.

    Returns:
      The row numbers of all devices, identical on every device and for any number of devices.

    Example:
      >>> path = jnp.array([[3], [0], [-1], [2]])  # 1 - 0 - 3 - 2
      >>> graph = PairGraph(path, jnp.ones_like(path), jnp.ones(4, jnp.int32))
      >>> jax.jit(cuthill_mckee)(graph, num_rows=4).tolist()
      [2, 3, 0, 1]

    Reference:
      Cuthill and McKee, "Reducing the bandwidth of sparse symmetric matrices", ACM 1969.
    """
    place = Place(axis_name, graph.rows.shape[0])
    numbers = jnp.arange(place.num_rows, dtype=jnp.int32)
    present = (graph.rows >= 0) & (graph.rows < num_rows)
    present &= (place.mine(numbers) < num_rows)[:, None]
    # Missing neighbours point past the end, where gathers and scatters drop them; -1 would wrap
    # around to the last row.
    ends = jnp.where(present, graph.rows, place.num_rows)
    # Padding rows have the largest degree and no edges, so they are components that sort last.
    degree = jnp.where(numbers < num_rows, _degrees(ends, place), _NONE)
    _, by_degree = lax.sort((degree, numbers), num_keys=2)
    rank = jnp.zeros_like(numbers).at[by_degree].set(numbers)
    seed = _seeds(ends, rank, by_degree, place)
    position = _positions(ends, rank, seed, place)
    order = lax.sort((seed, position, numbers), num_keys=2)[2]
    return order[jnp.where(numbers < num_rows, num_rows - 1 - numbers, numbers)]


def _degrees(ends: Int[Array, "_ k"], place: Place) -> Int[Array, " n"]:
    to = as_varying(jnp.zeros(place.num_rows, jnp.int32), ends).at[ends].add(1, mode="drop")
    mine = place.mine(to) + (ends < place.num_rows).sum(1, dtype=jnp.int32)
    return place.total(lax.dynamic_update_slice_in_dim(to, mine, place.first, 0))


def _least_of_neighbours(
    values: Int[Array, " n"], ends: Int[Array, "_ k"], place: Place
) -> Int[Array, " n"]:
    """The minimum value over each row's neighbours, along edges in both directions."""
    least = as_varying(jnp.full(place.num_rows, _NONE, jnp.int32), ends)
    least = least.at[ends].min(place.mine(values)[:, None], mode="drop")
    outgoing = values.at[ends].get(mode="fill", fill_value=_NONE).min(1)
    mine = jnp.minimum(place.mine(least), outgoing)
    least = lax.dynamic_update_slice_in_dim(least, mine, place.first, 0)
    return least if place.axis_name is None else lax.pmin(least, place.axis_name)


def _seeds(
    ends: Int[Array, "_ k"], rank: Int[Array, " n"], by_degree: Int[Array, " n"], place: Place
) -> Int[Array, " n"]:
    """The minimum rank in each row's component."""

    def spread(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        seed, _ = carry
        less = jnp.minimum(seed, _least_of_neighbours(seed, ends, place))
        # Pointer jumping: the row with that rank may already have a lower rank. Without this step,
        # a rank would spread by one edge per iteration.
        less = less[by_degree[less]]
        # All devices hold the same values, so they leave the loop and its collectives together.
        return less, (less != seed).any()

    return lax.while_loop(lambda carry: carry[1], spread, (rank, jnp.array(True)))[0]


def _positions(
    ends: Int[Array, "_ k"], rank: Int[Array, " n"], seed: Int[Array, " n"], place: Place
) -> Int[Array, " n"]:
    """Numbers that increase in traversal order within each component."""
    numbers = jnp.arange(place.num_rows, dtype=jnp.int32)

    def level(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        position, end, _ = carry
        # Earlier levels have positioned all of their neighbours. So the positioned neighbours of a
        # row without a position are all in the last level, and the first of them is its parent.
        parent = _least_of_neighbours(position, ends, place)
        new = (position == _NONE) & (parent < _NONE)
        # The other rows sort after the new rows, whose turns are 0, 1, ...
        by_turn = lax.sort((jnp.where(new, parent, _NONE), rank, numbers), num_keys=2)[2]
        turn = jnp.zeros_like(numbers).at[by_turn].set(numbers)
        position = jnp.where(new, end + turn, position)
        return position, end + new.sum(dtype=jnp.int32), new.any()

    # The first row of each component starts at its rank. Only the order of positions matters, so
    # gaps are harmless.
    start = (jnp.where(seed == rank, rank, _NONE), jnp.int32(place.num_rows), jnp.array(True))
    return lax.while_loop(lambda carry: carry[2], level, start)[0]
