"""An order of all rows in which those that follow each other are each other's hard negatives.

The problem is that of Sachidananda, Yang, Zhu, "Global Selection of Contrastive Batches via
Optimization on Sample Permutations", ICML 2023: to choose batches whose loss approaches the loss
over all keys. `"rcm"` is their method, the others work on a graph of neighbours on the devices.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from jaxcl.assignment.cuthill_mckee import paper_order
from jaxcl.assignment.gcbs_settings import Gcbs
from jaxcl.assignment.order_program import Report, Search, make_search, shared_search
from jaxcl.assignment.sizes import capacity_for, sizes_of
from jaxcl.ops.arguments import as_integers, check_numbers, native
from jaxcl.ops.mesh import default_settings, fetch, make_mesh, on_mesh, put_rows
from jaxcl.typing import Array, Float, Int, Key, Range, Scalar

__all__ = ["Ordered", "assign", "assign_topics", "make_order"]

DEFAULT = Gcbs()


def _silent(line: str) -> None:
    pass


def assign(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    block_size: int,
    batch_size: int | None = None,
    temperature: float = 0.05,
    seed: int = 0,
    apart: Sequence[Int[np.ndarray, " _"]] = (),
    settings: Gcbs = DEFAULT,
    report: Report = _silent,
) -> Int[np.ndarray, " n"]:
    """Orders pairs so that each `block_size` of them are each other's hard negatives.

    Runs on all devices of this process. `jaxcl.assignment.epoch_rows` makes batches of the order.

    Args:
      queries: one embedding per pair, `[n, d]`, of any length but 0; whatever NumPy makes an array
        of, such as a tensor of another framework in the host's memory.
      keys: the other side's.
      block_size: rows that are to meet in one batch. Whole batches, as hard as can be, have trained
        best so far.
      batch_size: of the batches, if several blocks are to share one; a multiple of `block_size`.
      temperature: of the loss.
      seed: of what is drawn.
      apart: labels by row, whose equals are no negatives and do not attract each other: ids of
        equal texts, groups.
      settings: the method and its parts.
      report: called with a line of text at each stage, such as `print`. Compiling may take a
        minute. Rows are padded to one of eight sizes per doubling, and calls of one padded size
        share a program, or two where the number of blocks passes a power of two. Only
        `method="rcm"`, whose products are rounded, compiles its small ones for each number of rows.

    Returns:
      All row numbers, each once, int32.

    Raises:
      ValueError: for sides that do not match, vectors that are not finite, and settings that cannot
        be.
      TypeError: for labels that are not integers.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> topics = np.repeat(np.eye(4, 8, dtype=np.float32), 4, axis=0)
      >>> shuffled = rng.permutation(16)
      >>> order = assign(topics[shuffled], topics[shuffled], block_size=4)
      >>> [len(set(block // 4)) for block in shuffled[order].reshape(4, 4)]
      [1, 1, 1, 1]
    """
    queries, keys = _sides(queries, keys)
    check_numbers("temperature", temperature, Range(above=0))
    order = _make_order(
        make_mesh({"data": -1}, devices=jax.local_devices()),
        shared_search,
        capacity=capacity_for(len(queries)),
        num_rows=len(queries),
        block_size=block_size,
        batch_size=block_size if batch_size is None else batch_size,
        settings=settings,
    )
    return order(queries, keys, temperature, jax.random.key(seed), apart, report=report).rows


def assign_topics(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    num_topics: int,
    temperature: float = 0.05,
    seed: int = 0,
    settings: Gcbs = DEFAULT,
    report: Report = _silent,
) -> Int[np.ndarray, " n"]:
    """Sorts pairs into topics of equal size: blocks of `assign`, for `SourcedRows`.

    Args:
      queries: one embedding per pair, as for `assign`.
      keys: the other side's.
      num_topics: how many; fewer where the rows do not fill as many of equal size.
      temperature: of the loss; the lower it is, the more the nearest rows decide.
      seed: of what is drawn.
      settings: the method and its parts.
      report: as for `assign`.

    Returns:
      Each row's topic, int32, numbered from 0. All have `ceil(n / num_topics)` rows but the last,
      which may have fewer. Topics of near numbers are near each other.

    Raises:
      ValueError: for no topic, or fewer rows than topics; and as `assign`.

    Example:
      >>> rows = np.repeat(np.eye(4, 8, dtype=np.float32), 4, axis=0)
      >>> found = assign_topics(rows, rows, num_topics=4)
      >>> [len(set(topics)) for topics in found.reshape(4, 4)], len(set(found))
      ([1, 1, 1, 1], 4)
    """
    queries, keys = _sides(queries, keys)
    num_topics = operator.index(num_topics)
    if not 1 <= num_topics <= len(queries):
        raise ValueError(f"num_topics={num_topics} of {len(queries)} rows; give from 1 to as many")
    size = -(-len(queries) // num_topics)
    order = assign(
        queries,
        keys,
        block_size=size,
        temperature=temperature,
        seed=seed,
        settings=settings,
        report=report,
    )
    topics = np.empty(len(order), np.int32)
    topics[order] = np.arange(len(order), dtype=np.int32) // size
    return topics


class Ordered(NamedTuple):
    """An order, and what it took.

    Attributes:
      rows: all row numbers, each once.
      device_bytes: what a device holds at a time: embeddings, graph, order; 0 for a host's method.
    """

    rows: Int[np.ndarray, " n"]
    device_bytes: int


Order = Callable[..., Ordered]
"""`(queries, keys, temperature, key, apart=(), *, report) -> Ordered`, of rows anywhere."""


def make_order(
    mesh: Mesh, *, num_rows: int, block_size: int, batch_size: int, settings: Gcbs
) -> Order:
    """What orders a data set, compiled once.

    Args:
      mesh: over whose devices rows are sharded.
      num_rows: of the data set.
      block_size: rows that are to meet in one batch.
      batch_size: of the batches.
      settings: the method and its parts.

    Returns:
      `(queries, keys, temperature, key, apart=(), *, report) -> Ordered`, with `report` as for
      `assign`. Embeddings may have more rows than `num_rows`, which are left out. Equal on any
      number of devices. A pair that is not finite has no neighbours.

    Raises:
      ValueError: for sizes that cannot be.
    """
    return _make_order(
        mesh,
        make_search,
        capacity=operator.index(num_rows),
        num_rows=num_rows,
        block_size=block_size,
        batch_size=batch_size,
        settings=settings,
    )


def _make_order(
    mesh: Mesh,
    compiler: Callable[..., Search],
    *,
    capacity: int,
    num_rows: int,
    block_size: int,
    batch_size: int,
    settings: Gcbs,
) -> Order:
    """`make_order` for rows padded to `capacity`, by `make_search` or `shared_search`."""
    num_rows, block_size, batch_size = map(operator.index, (num_rows, block_size, batch_size))
    settings.check()
    if min(num_rows, block_size, batch_size) < 1 or batch_size % block_size:
        raise ValueError(
            f"num_rows={num_rows}, block_size={block_size}, batch_size={batch_size}; a batch holds "
            "whole blocks of at least 1 row"
        )
    if settings.method == "rcm":
        return functools.partial(_paper_order, num_rows=num_rows, quantile=settings.quantile)
    sizes = sizes_of(num_rows, block_size=block_size, batch_size=batch_size, settings=settings)
    search = compiler(mesh, capacity=capacity, settings=settings)

    def order(
        queries: Array | np.ndarray,
        keys: Array | np.ndarray,
        temperature: float | Scalar,
        key: Key[Array, ""],
        apart: Sequence[Int[np.ndarray, " _"]] = (),
        *,
        report: Report = _silent,
    ) -> Ordered:
        check_numbers("temperature", temperature, Range(above=0))
        lengths = [len(part) for part in (queries, keys, *apart)]
        if min(lengths) < num_rows or any(length != num_rows for length in lengths[2:]):
            raise ValueError(
                f"sides of {lengths[:2]} rows and labels of {lengths[2:]}, of a data set of "
                f"{num_rows}; give one of each per row"
            )
        sides = [
            put_rows(side, mesh, num_rows=capacity).astype(jnp.float32) for side in (queries, keys)
        ]
        labels = tuple(put_rows(_numbered(label), mesh, num_rows=len(sides[0])) for label in apart)
        scalars = on_mesh((jnp.float32(temperature), key), mesh)
        arguments = (*sides, *scalars, labels, sizes)
        with default_settings(mesh):
            executable, device_bytes = search(arguments, report)
            report(f"searching for the order of {num_rows:,} rows on {mesh.size} devices")
            return Ordered(np.asarray(executable(*arguments))[:num_rows], device_bytes)

    return order


def _paper_order(
    queries: Array | np.ndarray,
    keys: Array | np.ndarray,
    temperature: float | Scalar,
    key: Key[Array, ""],
    apart: Sequence[Int[np.ndarray, " _"]] = (),
    *,
    num_rows: int,
    quantile: float,
    report: Report = _silent,
) -> Ordered:
    """The paper's method, which knows no temperature, no labels, and draws nothing of account."""
    sides = (_on_host(side)[:num_rows] for side in (queries, keys))
    sides = (side.astype(np.promote_types(side.dtype, np.float32)) for side in sides)
    sides = (np.where(np.isfinite(side).all(1, keepdims=True), side, 0) for side in sides)
    unit = (side / np.linalg.norm(side, axis=1, keepdims=True).clip(1e-30) for side in sides)
    compared = 0

    def advance(rows: int) -> None:
        nonlocal compared
        tenths = 10 * compared // num_rows
        compared += rows
        if 10 * compared // num_rows > tenths:
            report(f"compared {compared:,} of {num_rows:,} rows with all others")

    return Ordered(paper_order(*unit, quantile=quantile, advance=advance), 0)


def _numbered(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same labels as small numbers: those of 64 bits would lose half of them on a device."""
    numbers = np.unique(as_integers("apart", labels), return_inverse=True)[1]
    return numbers.astype(np.int32)


def _on_host(rows: Array | np.ndarray) -> np.ndarray:
    if isinstance(rows, jax.Array) and not rows.is_fully_addressable:
        return fetch(rows)
    return np.asarray(rows)


def _sides(
    queries: ArrayLike, keys: ArrayLike
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Both as arrays that can be ordered."""
    queries, keys = native(np.asarray(queries)), native(np.asarray(keys))
    if queries.shape != keys.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(
            f"queries {queries.shape} and keys {keys.shape}; give one row of each per pair, and "
            "as many features: [n, d]"
        )
    for name, side in (("queries", queries), ("keys", keys)):
        if not jnp.issubdtype(side.dtype, jnp.floating) and side.dtype.kind not in "iu":
            raise TypeError(f"{name} has the type {side.dtype}; give floats")
        with np.errstate(over="ignore"):  # of float64
            bad = np.flatnonzero(~np.isfinite(side.astype(np.float32)).all(1))
        if len(bad):
            raise ValueError(
                f"{name} has {len(bad)} embeddings that are not finite in float32; the first is "
                f"row {bad[0]}"
            )
    return queries, keys
