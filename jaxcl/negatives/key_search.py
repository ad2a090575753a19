"""Exact search among keys on the devices, where each query excludes some keys."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxcl.ops.arguments import host_labels
from jaxcl.ops.mesh import default_settings, fetch, put_rows
from jaxcl.ops.nearest import Nearest, nearest
from jaxcl.ops.pairs import PairLabels
from jaxcl.typing import Array, Float, Int, Integer

__all__ = ["KeySearch", "NearestKeys", "make_key_search"]


class NearestKeys(NamedTuple):
    """The keys nearest to each query, like `jaxcl.ops.nearest.Nearest`, but as NumPy arrays."""

    similarities: Float[np.ndarray, "q m"]
    rows: Int[np.ndarray, "q m"]


KeySearch = Callable[
    [np.ndarray, tuple[Any, ...], np.ndarray, tuple[int, int]],
    NearestKeys,
]
"""`(queries, groups, excluded, rank_range) -> nearest keys`, all of them in NumPy. `excluded` holds
rows of keys for each query, `[q, e]`, padded with −1; ranks count the other keys from 0."""

_FEW = 8  # excluded keys for which every query has room, so that most blocks share one program


def make_key_search(
    keys: Float[np.ndarray, "k d"],
    candidates: Any,
    groups: tuple[Any, ...],
    *,
    block_rows: int,
    mesh: Mesh,
) -> KeySearch:
    """Put keys on the devices, and return a function that searches them.

    Args:
      keys: embeddings in float32.
      candidates: the keys that may be found, as booleans; `None` for all.
      groups: arrays of integer labels; a query finds no key with its own label.
      block_rows: the number of queries that are searched for at a time.
      mesh: the devices.

    Raises:
      ValueError: if candidates or groups are not one per key, or a label does not fit int32.
    """
    labels = tuple(host_labels("key_groups", label) for label in groups)
    allowed = np.ones(len(keys), bool) if candidates is None else np.asarray(candidates, bool)
    for name, values in (("candidates", allowed), *(("key_groups", label) for label in labels)):
        if values.shape != (len(keys),):
            raise ValueError(
                f"{name} has the shape {values.shape}; give one entry for each of {len(keys)} keys"
            )
    with default_settings(mesh):
        # `put_rows` pads with False, so that padding is never found.
        vectors, labels, allowed = jax.tree.map(
            lambda rows: put_rows(rows, mesh, num_rows=len(keys)), (keys, labels, allowed)
        )
    pool = vectors, PairLabels(different=labels, valid=allowed)
    height = block_rows + -block_rows % mesh.size
    return functools.partial(_nearest_allowed, mesh, height, pool)


def _nearest_allowed(
    mesh: Mesh,
    height: int,
    pool: tuple[Array, PairLabels],
    vectors: Float[np.ndarray, "q d"],
    groups: tuple[Any, ...],
    excluded: Integer[np.ndarray, "q e"],
    rank_range: tuple[int, int],
) -> NearestKeys:
    """The keys in the range of ranks; `KeySearch` describes the arguments."""
    first, last = rank_range
    shape = (len(vectors), last - first)
    similarities, rows = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    # The nearest `last + e` keys hold the nearest `last` that are not among `e` excluded keys. `e`
    # has only a few sizes, so that few programs are compiled; large sizes get small blocks.
    counts = np.maximum((excluded >= 0).sum(1), _FEW)
    sizes = 2 ** np.ceil(np.log2(counts)).astype(int)
    for size in np.unique(sizes):
        members = np.flatnonzero(sizes == size)
        part = max(height * (last + _FEW) // (last + int(size)), 1)
        part += -part % mesh.size
        for begin in range(0, len(members), part):
            here = members[begin : begin + part]
            labels = tuple(host_labels("query_groups", label[here]) for label in groups)
            neighbours = _search(mesh, last + int(size), part, (vectors[here], labels), pool)
            neighbours = _without(neighbours, excluded[here])
            similarities[here] = neighbours.similarities[:, first:last]
            rows[here] = neighbours.rows[:, first:last]
    return NearestKeys(similarities, rows)


def _without(results: NearestKeys, excluded: Integer[np.ndarray, "q e"]) -> NearestKeys:
    """The results without the excluded rows of each query, padded at the end."""
    base = max(int(results.rows.max(initial=0)), int(excluded.max(initial=0))) + 1
    first = base * np.arange(len(excluded))[:, None]
    masked = np.isin(first + results.rows, (first + excluded)[excluded >= 0]) & (results.rows >= 0)
    similarities = np.where(masked, -np.inf, results.similarities)
    rows = np.where(masked, -1, results.rows)
    order = np.argsort(masked, axis=1, kind="stable")
    return NearestKeys(*(np.take_along_axis(part, order, 1) for part in (similarities, rows)))


def _search(mesh: Mesh, count: int, height: int, block: Any, pool: Any) -> NearestKeys:
    """The nearest rows of a block of queries, which is padded to `height` rows."""
    num_queries = len(block[0])
    queries = jax.tree.map(lambda rows: put_rows(rows, mesh, num_rows=height), block)
    # Accelerators multiply in lower precision by default; ranks would then disagree with scores.
    with jax.default_matmul_precision("highest"):
        neighbours = _program(mesh, count)(queries, pool)
    return NearestKeys(*(fetch(values)[:num_queries] for values in neighbours))


@functools.lru_cache(maxsize=16)
def _program(mesh: Mesh, count: int) -> Callable[[Any, Any], Nearest]:
    rows = PartitionSpec(mesh.axis_names)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    def search(queries: Any, pool: Any) -> Nearest:
        (vectors, labels), (keys, key_labels) = queries, pool
        return nearest(
            vectors,
            keys,
            count=count,
            query_labels=PairLabels(different=labels),
            table_labels=key_labels,
            axis_name=mesh.axis_names,
        )

    return search
