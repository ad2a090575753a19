"""Order all rows so that consecutive rows are hard negatives of each other.

The goal is that of Sachidananda, Yang and Zhu, "Global Selection of Contrastive Batches via
Optimization on Sample Permutations", ICML 2023: batches whose loss approaches the loss over all
keys. `"rcm"` is their method; the other methods order a neighbour graph on the devices.
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
    keep_apart: Sequence[Int[np.ndarray, " _"]] = (),
    settings: Gcbs = DEFAULT,
    report: Report = _silent,
) -> Int[np.ndarray, " n"]:
    """Order pairs so that the pairs in each block of `block_size` are each other's hard negatives.

    Runs on all devices of this process. `jaxcl.assignment.epoch_rows` cuts the order into batches.

    Args:
      queries: one nonzero embedding per pair, `[n, d]`, as anything that NumPy can convert, such as
        another framework's tensor in host memory.
      keys: the keys of the queries, in the same format.
      block_size: rows that share a batch. Blocks as large as the batch have trained best so far.
      batch_size: rows of a batch, if a batch holds several blocks; a multiple of `block_size`.
      temperature: temperature of the loss.
      seed: seed of the random starts and swaps.
      keep_apart: label arrays, such as text ids or groups; rows with an equal label are not
        negatives and are never neighbours.
      settings: the method and its settings.
      report: called with a line of text at each stage, such as `print`. Compiling may take a
        minute. Rows are padded to one of eight sizes per doubling, and calls of one padded size
        share a program, or two if the number of blocks passes a power of two. Only `method="rcm"`
        compiles its programs, which are small, for each number of rows.

    Returns:
      All row numbers, each once, int32.

    Raises:
      ValueError: if queries and keys do not match, an embedding is not finite, or a setting is
        invalid.
      TypeError: if the labels are not integers.

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
    return order(queries, keys, temperature, jax.random.key(seed), keep_apart, report=report).rows


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
    """Cluster pairs into topics of equal size for `SourcedRows`. The topics are blocks of `assign`.

    Args:
      queries: one embedding per pair, as for `assign`.
      keys: the keys of the queries.
      num_topics: number of topics; the result has fewer if fewer topics of this size hold all rows.
      temperature: temperature of the loss; lower values give the nearest rows more weight.
      seed: seed of the random starts and swaps.
      settings: the method and its settings.
      report: as for `assign`.

    Returns:
      Each row's topic, int32, numbered from 0. Each topic has `ceil(n / num_topics)` rows, except
      that the last may have fewer. Topics with nearby numbers are similar.

    Raises:
      ValueError: if `num_topics` is not from 1 to the number of rows; and as for `assign`.

    Example:
      >>> rows = np.repeat(np.eye(4, 8, dtype=np.float32), 4, axis=0)
      >>> topics = assign_topics(rows, rows, num_topics=4)
      >>> [len(set(group)) for group in topics.reshape(4, 4)], len(set(topics))
      ([1, 1, 1, 1], 4)
    """
    queries, keys = _sides(queries, keys)
    num_topics = operator.index(num_topics)
    if not 1 <= num_topics <= len(queries):
        raise ValueError(f"num_topics={num_topics} must be from 1 to the {len(queries)} rows")
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
    """An order, and the memory of the search that found it.

    Attributes:
      rows: all row numbers, each once.
      device_bytes: memory that the search needs per device; 0 for `method="rcm"`.
    """

    rows: Int[np.ndarray, " n"]
    device_bytes: int


Order = Callable[..., Ordered]
"""`(queries, keys, temperature, key, keep_apart=(), *, report) -> Ordered`, on any devices."""


def make_order(
    mesh: Mesh, *, num_rows: int, block_size: int, batch_size: int, settings: Gcbs
) -> Order:
    """Build a function that orders a data set, compiled once.

    Args:
      mesh: the devices that rows are sharded over.
      num_rows: rows of the data set.
      block_size: rows that share a batch.
      batch_size: rows of a batch.
      settings: the method and its settings.

    Returns:
      `(queries, keys, temperature, key, keep_apart=(), *, report) -> Ordered`, with `report` as
      for `assign`. Embeddings may have more rows than `num_rows`; these are ignored. The order
      does not depend on the number of devices. A pair that is not finite has no neighbours.

    Raises:
      ValueError: if a size is below 1, or blocks do not divide the batch.
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
    """Build `make_order` for rows padded to `capacity`, with `make_search` or `shared_search`."""
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
        keep_apart: Sequence[Int[np.ndarray, " _"]] = (),
        *,
        report: Report = _silent,
    ) -> Ordered:
        check_numbers("temperature", temperature, Range(above=0))
        lengths = [len(part) for part in (queries, keys, *keep_apart)]
        if min(lengths) < num_rows or any(length != num_rows for length in lengths[2:]):
            raise ValueError(
                f"queries and keys have {lengths[:2]} rows and labels {lengths[2:]}, but the data "
                f"set has {num_rows}; give one of each per row"
            )
        sides = [
            put_rows(side, mesh, num_rows=capacity).astype(jnp.float32) for side in (queries, keys)
        ]
        labels = tuple(
            put_rows(_numbered(label), mesh, num_rows=len(sides[0])) for label in keep_apart
        )
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
    keep_apart: Sequence[Int[np.ndarray, " _"]] = (),
    *,
    num_rows: int,
    quantile: float,
    report: Report = _silent,
) -> Ordered:
    """Order rows by the paper's method, which ignores the temperature, the key and labels."""
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
    """Renumber labels as int32, since devices would truncate 64-bit labels."""
    numbers = np.unique(as_integers("keep_apart", labels), return_inverse=True)[1]
    return numbers.astype(np.int32)


def _on_host(rows: Array | np.ndarray) -> np.ndarray:
    if isinstance(rows, jax.Array) and not rows.is_fully_addressable:
        return fetch(rows)
    return np.asarray(rows)


def _sides(
    queries: ArrayLike, keys: ArrayLike
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Check both sides, and convert them to arrays."""
    queries, keys = native(np.asarray(queries)), native(np.asarray(keys))
    if queries.shape != keys.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(
            f"queries {queries.shape} and keys {keys.shape}; give one row of each per pair, with "
            "equally many features: [n, d]"
        )
    for name, side in (("queries", queries), ("keys", keys)):
        if not jnp.issubdtype(side.dtype, jnp.floating) and side.dtype.kind not in "iu":
            raise TypeError(f"{name} has the type {side.dtype}; give floats")
        with np.errstate(over="ignore"):  # float64 values may exceed float32
            bad = np.flatnonzero(~np.isfinite(side.astype(np.float32)).all(1))
        if len(bad):
            raise ValueError(
                f"{name} has {len(bad)} embeddings that are not finite in float32; the first is "
                f"row {bad[0]}"
            )
    return queries, keys
