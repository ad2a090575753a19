"""TPU kernels that reduce the scores tile by tile: product, mask and sums stay on the chip.

The forward pass is one kernel: a tile's product updates the sums of its rows and columns, which
stay in the core's memory. The backward pass is two kernels, and each recomputes the tiles. One runs
along the rows and sums the queries' gradients; the other runs down the columns for the keys. On
other devices the kernels are interpreted, which is slow and meant for tests.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcl.ops.pairs.reductions import Reduced, Reduction, Residuals
from jaxcl.ops.pairs.sides import PairKeys, PairQueries, as_columns, as_rows, block_scores
from jaxcl.ops.varying import shape_like_varying
from jaxcl.ops.vectors import inner_products
from jaxcl.typing import Array, Bool, Float, PyTree

__all__ = ["TILE", "backward", "forward"]

TILE = 512
"""Rows and columns per tile: 1 MiB of float32 scores, next to two blocks of each side."""

# Above the compiler's default, to fit blocks of wide embeddings and the results of all columns.
_CORE_MEMORY_BYTES = 64 * 2**20


def forward(
    reduction: Reduction, queries: PairQueries, keys: PairKeys, *, hardness: float, tile: int
) -> Reduced:
    """Reduce every row and every column, with one product per tile."""
    cut = _Cut.of(queries, keys, tile)
    wide = jnp.promote_types(queries.vectors.dtype, jnp.float32)

    def kernel(sides: PyTree, rows: Any, columns: Any) -> None:
        i, j = pl.program_id(0), pl.program_id(1)
        column_index = (pl.ds(j, 1), slice(None))

        @pl.when(j == 0)
        def _() -> None:
            rows[...] = jnp.full(rows.shape, reduction.empty, wide)

        @pl.when(i == 0)
        def _() -> None:
            columns[column_index] = jnp.full((1, cut.width), reduction.empty, wide)

        scores = _tile_scores(sides, cut, i, j, hardness)[0]
        rows[...] = reduction.join(rows[...], reduction.reduce(scores, 1)[:, None])
        more = reduction.reduce(scores, 0)[None, :]
        columns[column_index] = reduction.join(columns[column_index], more)

    rows, columns = _call(
        kernel,
        _sides(queries, keys, (), ()),
        cut,
        order=lambda i, j: (i, j),
        results=(
            ((cut.num_queries, 1), (cut.height, 1), lambda i, j: (i, 0)),
            # One row per tile across. The results of all columns stay in memory throughout, since
            # every row of tiles updates all of them.
            ((cut.across, cut.width), (cut.across, cut.width), lambda i, j: (0, 0)),
        ),
        dtype=wide,
    )
    return rows[:, 0], columns.reshape(-1)[: cut.num_keys]


def backward(
    reduction: Reduction, residuals: Residuals, cotangents: Reduced, *, hardness: float, tile: int
) -> tuple[Float[Array, "q d"], Float[Array, " q"], Float[Array, "k d"], Float[Array, " k"]]:
    """Compute the gradients of query vectors, scales, key vectors and biases.

    Each tile takes four products.
    """
    queries, keys, reduced = residuals
    cut = _Cut.of(queries, keys, tile)
    wide = jnp.promote_types(queries.vectors.dtype, jnp.float32)
    dim = queries.vectors.shape[1]
    sides = _sides(queries, keys, *zip(reduced, cotangents, strict=True))

    def gradients(sides: PyTree, i: Array, j: Array) -> tuple[Array, Array, Array, Array]:
        """The gradients of a tile's scores and inner products, and the vectors of both sides."""
        scores, (query_block, key_block) = _tile_scores(sides, cut, i, j, hardness)
        to_scores = reduction.weigh(scores, *query_block.values) + reduction.weigh(
            scores, *key_block.values
        )
        weights = (to_scores * query_block.labels.scale).astype(query_block.vectors.dtype)
        return to_scores, weights, query_block.vectors, key_block.vectors

    def to_queries_kernel(sides: PyTree, to_queries: Any) -> None:
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            to_queries[...] = jnp.zeros(to_queries.shape, wide)

        weights, vectors = gradients(sides, i, j)[1::2]
        to_queries[...] += _product(weights, vectors, 1, wide)

    def to_keys_kernel(sides: PyTree, to_keys: Any, to_biases: Any) -> None:
        j, i = pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _() -> None:
            to_keys[...] = jnp.zeros(to_keys.shape, wide)
            to_biases[...] = jnp.zeros(to_biases.shape, wide)

        to_scores, weights, vectors = gradients(sides, i, j)[:3]
        to_keys[...] += _product(weights, vectors, 0, wide)
        to_biases[...] += to_scores.sum(0, keepdims=True)

    call = functools.partial(_call, sides=sides, cut=cut, dtype=wide)
    (to_queries,) = call(
        to_queries_kernel,
        order=lambda i, j: (i, j),
        results=(((cut.num_queries, dim), (cut.height, dim), lambda i, j: (i, 0)),),
    )
    to_keys, to_biases = call(
        to_keys_kernel,
        order=lambda j, i: (i, j),
        results=(
            ((cut.num_keys, dim), (cut.width, dim), lambda j, i: (j, 0)),
            ((1, cut.num_keys), (1, cut.width), lambda j, i: (0, j)),
        ),
    )
    to_scales = jnp.einsum("qd,qd->q", to_queries, queries.vectors.astype(wide)) / queries.scale
    return to_queries, to_scales, to_keys, to_biases[0]


class _Cut(NamedTuple):
    """How the matrix is cut into tiles; the last tiles may extend past its ends.

    Attributes:
      num_queries: rows of the matrix.
      num_keys: columns of the matrix.
      height: rows per tile.
      width: columns per tile.
    """

    num_queries: int
    num_keys: int
    height: int
    width: int

    @classmethod
    def of(cls, queries: PairQueries, keys: PairKeys, tile: int) -> "_Cut":
        sizes = queries.vectors.shape[0], keys.vectors.shape[0]
        return cls(*sizes, *(min(tile, size) for size in sizes))

    @property
    def down(self) -> int:
        return -(-self.num_queries // self.height)

    @property
    def across(self) -> int:
        return -(-self.num_keys // self.width)

    def inside(self, i: Array, j: Array) -> Bool[Array, "q k"]:
        """Whether each entry of a tile is inside the matrix."""
        shape = (self.height, self.width)
        row = i * self.height + lax.broadcasted_iota(jnp.int32, shape, 0)
        column = j * self.width + lax.broadcasted_iota(jnp.int32, shape, 1)
        return (row < self.num_queries) & (column < self.num_keys)


def _call(
    kernel: Callable[..., None],
    sides: PyTree,
    cut: _Cut,
    *,
    order: Callable,
    results: tuple[tuple[tuple[int, int], tuple[int, int], Callable], ...],
    dtype: jnp.dtype,
) -> Sequence[Array]:
    """Run a kernel on every tile; the second grid index varies fastest.

    Args:
      kernel: (references of both sides, one reference per result).
      sides: the arrays of the queries, as columns, and of the keys, as rows.
      cut: how the matrix is cut into tiles.
      order: grid indices -> (row, column) of the tile.
      results: for each result, its shape, the shape of its block, and a function from grid indices
        to the block's index.
      dtype: type of the results.
    """
    bools = [leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(sides)]
    numbers = jax.tree.map(
        lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf, sides
    )
    leaves = jax.tree.leaves(numbers)
    treedef: Any = jax.tree.structure(numbers)
    specs = jax.tree.leaves(_specs(numbers, cut, order), is_leaf=_is_spec)

    def body(*references: Any) -> None:
        blocks = [_Block(ref, is_bool) for ref, is_bool in zip(references, bools, strict=False)]
        kernel(treedef.unflatten(blocks), *references[len(bools) :])

    down, across = cut.down, cut.across
    call = functools.partial(
        pl.pallas_call,
        body,
        grid=(down, across) if order(0, 1) == (0, 1) else (across, down),
        in_specs=specs,
        out_specs=[pl.BlockSpec(block, index) for _, block, index in results],
        out_shape=[shape_like_varying(shape, dtype, leaves[0]) for shape, _, _ in results],
        # Sequential along both axes: a "parallel" axis may be split over two cores, which would
        # break sums that accumulate along it.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_CORE_MEMORY_BYTES
        ),
    )
    return lax.platform_dependent(*leaves, tpu=call(), default=call(interpret=True))


class _Block(NamedTuple):
    """A block of one side's array that is read on demand; int32 represents bool."""

    reference: Any
    is_bool: bool

    def read(self, axis: int, start: Array, size: int) -> Array:
        """Read the values, with 0 past the end of the matrix along an axis."""
        values = self.reference[...]
        if size % values.shape[axis]:
            index = start * values.shape[axis] + lax.broadcasted_iota(jnp.int32, values.shape, axis)
            values = jnp.where(index < size, values, jnp.zeros((), values.dtype))
        return values != 0 if self.is_bool else values


class _Side(NamedTuple):
    """One side's inputs to a kernel.

    Attributes:
      labels: `as_columns` of queries, `as_rows` of keys.
      values: the reduced rows or columns and their cotangents, in the same shapes.
      vectors: the side's vectors.
      guide: the guide's vectors, or `None`.
    """

    labels: PyTree
    values: PyTree
    vectors: Any
    guide: Any


def _sides(
    queries: PairQueries, keys: PairKeys, of_rows: PyTree, of_columns: PyTree
) -> tuple[_Side, _Side]:
    columns = jax.tree.map(lambda values: values[:, None], of_rows)
    rows = jax.tree.map(lambda values: values[None, :], of_columns)
    return (
        _Side(as_columns(queries), columns, queries.vectors, queries.labels.guide),
        _Side(as_rows(keys), rows, keys.vectors, keys.labels.guide),
    )


def _map_sides(down: Callable, across: Callable, vectors: Callable, sides: PyTree) -> PyTree:
    """Map arrays along the rows, arrays along the columns, and the keys' vectors.

    The keys' vectors belong to columns, but are stored as rows.
    """
    queries, keys = sides
    row_arrays = jax.tree.map(across, (keys.labels, keys.values), is_leaf=_is_block)
    vector_arrays = jax.tree.map(vectors, (keys.vectors, keys.guide), is_leaf=_is_block)
    return jax.tree.map(down, queries, is_leaf=_is_block), _Side(*row_arrays, *vector_arrays)


def _specs(sides: PyTree, cut: _Cut, order: Callable) -> PyTree:
    """The block specification of every array of both sides."""

    def down(leaf: Array) -> pl.BlockSpec:
        return pl.BlockSpec((cut.height, leaf.shape[1]), lambda *at: (order(*at)[0], 0))

    def across(leaf: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, cut.width), lambda *at: (0, order(*at)[1]))

    def vectors(leaf: Array) -> pl.BlockSpec:
        return pl.BlockSpec((cut.width, leaf.shape[1]), lambda *at: (order(*at)[1], 0))

    return _map_sides(down, across, vectors, sides)


def _loaded(sides: PyTree, cut: _Cut, i: Array, j: Array) -> PyTree:
    """Read both sides' blocks, with 0 past the ends of the matrix."""
    # Memory past the ends is undefined, and a NaN there would survive a product with weight 0.
    return _map_sides(
        lambda block: block.read(0, i, cut.num_queries),
        lambda block: block.read(1, j, cut.num_keys),
        lambda block: block.read(0, j, cut.num_keys),
        sides,
    )


def _is_block(node: Any) -> bool:
    return isinstance(node, _Block)


def _is_spec(node: Any) -> bool:
    return isinstance(node, pl.BlockSpec)


def _tile_scores(
    sides: PyTree, cut: _Cut, i: Array, j: Array, hardness: float
) -> tuple[Float[Array, "q k"], tuple[_Side, _Side]]:
    """The scores of tile (i, j), −∞ for masked pairs, and both sides' blocks."""
    query_block, key_block = _loaded(sides, cut, i, j)
    similarity = inner_products(query_block.vectors, key_block.vectors)
    guided = (
        None if query_block.guide is None else inner_products(query_block.guide, key_block.guide)
    )
    scores, allowed = block_scores(
        similarity, similarity, guided, query_block.labels, key_block.labels, hardness=hardness
    )
    return jnp.where(allowed & cut.inside(i, j), scores, -jnp.inf), (query_block, key_block)


def _product(
    weights: Float[Array, "q k"], vectors: Float[Array, "r d"], axis: int, wide: jnp.dtype
) -> Float[Array, "s d"]:
    dimensions = (((axis,), (0,)), ((), ()))
    return lax.dot_general(weights, vectors, dimensions, preferred_element_type=wide)
