"""Kernels for NVIDIA GPUs since Hopper that reduce large tiles, whose scores stay on the chip.

Tiles are as in `tiled`, but thousands wide, and each is one kernel launch. Every thread block
multiplies 128 queries by 128 keys on the tensor cores and keeps the scores in registers. The
forward pass reduces them to one number per row and column. The backward pass converts them to
weights and writes these in the vectors' type. XLA computes the two products of the gradients.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal

from jaxcl.ops.pairs import tiled
from jaxcl.ops.pairs.reductions import Reduced, Reduction, Residuals
from jaxcl.ops.pairs.sides import PairKeys, PairQueries, as_columns, as_rows, block_scores
from jaxcl.ops.varying import shape_like_varying
from jaxcl.typing import Array, Float, PyTree

__all__ = ["INTERPRET", "TILE", "backward", "forward"]

TILE = 8_192
"""Rows and columns per launch: 128 MiB of bfloat16 weights in the backward pass."""

INTERPRET: Any = None
"""The `interpret` argument of `plgpu.kernel`, for tests."""

_WHOLE = (...,) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before jax 0.12
_BLOCK = 128  # queries and keys per thread block
_CHUNK = 64  # features per step: 128 bytes, the width of a swizzle in shared memory
_STAGES = 3  # chunks in flight


def _reduce(
    reduction: Reduction, queries: PairQueries, keys: PairKeys, *, hardness: float
) -> Reduced:
    sizes = queries.vectors.shape[0], keys.vectors.shape[0]
    queries, keys = _padded(queries), _padded(keys)
    down, across = _blocks(queries, keys)

    def epilogue(scores: Array, labels: tuple, i: Array, j: Array, results: Sequence) -> None:
        # Each block writes separate partial results, since atomic sums would depend on the order of
        # blocks.
        rows, columns = results
        rows[j, pl.ds(i * _BLOCK, _BLOCK)] = _in_kernel(reduction.reduce, scores, 1)
        columns[i, pl.ds(j * _BLOCK, _BLOCK)] = _in_kernel(reduction.reduce, scores, 0)

    rows, columns = _launch(
        epilogue,
        (queries, keys),
        ((), ()),
        hardness,
        results=(
            ((across, down * _BLOCK), jnp.dtype("float32")),
            ((down, across * _BLOCK), jnp.dtype("float32")),
        ),
    )
    return tuple(
        lax.reduce(parts, jnp.float32(reduction.empty), reduction.join, (0,))[:size]
        for parts, size in zip((rows, columns), sizes, strict=True)
    )


def _weigh(
    reduction: Reduction, residuals: Residuals, cotangents: Reduced, *, hardness: float
) -> tuple[Float[Array, "q k"], Float[Array, " k"]]:
    queries, keys, reduced = residuals
    num_queries, num_keys = queries.vectors.shape[0], keys.vectors.shape[0]
    dtype = queries.vectors.dtype
    queries, keys = _padded(queries), _padded(keys)
    down, across = _blocks(queries, keys)
    of_rows, of_columns = zip(
        *(map(_padded_rows, both) for both in (reduced, cotangents)), strict=True
    )

    def epilogue(scores: Array, labels: tuple, i: Array, j: Array, results: Sequence) -> None:
        weights, to_biases, staged = results
        (query_labels, of_rows), (_, of_columns) = labels
        gradient = _in_kernel(reduction.weigh, scores, *of_rows)
        gradient += _in_kernel(reduction.weigh, scores, *of_columns)
        to_biases[i, pl.ds(j * _BLOCK, _BLOCK)] = gradient.sum(0)
        staged[...] = (gradient * query_labels.scale).astype(dtype)
        # Makes the writes visible to the asynchronous copy; the wait keeps the block and its shared
        # memory alive until the copy is done.
        plgpu.commit_smem()
        window = (pl.ds(i * _BLOCK, _BLOCK), pl.ds(j * _BLOCK, _BLOCK))
        plgpu.copy_smem_to_gmem(staged, weights.at[window])
        plgpu.wait_smem_to_gmem(0)

    weights, to_biases = _launch(
        epilogue,
        (queries, keys),
        (of_rows, of_columns),
        hardness,
        results=(
            ((down * _BLOCK, across * _BLOCK), dtype),
            ((down, across * _BLOCK), jnp.dtype("float32")),
        ),
        scratch=(plgpu.SMEM((_BLOCK, _BLOCK), dtype, transforms=_transforms()),),
    )
    return weights[:num_queries, :num_keys], to_biases.sum(0)[:num_keys]


_KERNELS = tiled.TileOps(_reduce, _weigh)

forward = functools.partial(tiled.forward_by, _KERNELS)
"""`tiled.forward_by` with these kernels."""

backward = functools.partial(tiled.backward_by, _KERNELS)
"""`tiled.backward_by` with these kernels."""


def _launch(
    epilogue: Callable[..., None],
    sides: tuple[PairQueries, PairKeys],
    values: tuple[PyTree, PyTree],
    hardness: float,
    *,
    results: Sequence[tuple[tuple[int, int], jnp.dtype]],
    scratch: Sequence[Any] = (),
) -> Sequence[Array]:
    """Run a kernel on every block of a tile.

    Args:
      epilogue: (scores, both sides' labels and values, row and column of the block, references of
        results and scratch); labels and values are broadcast to the block.
      sides: queries and keys, padded to whole blocks.
      values: additional arrays of each side for the epilogue, one value per row.
      hardness: weight of the constant similarity in the scores.
      results: shapes and types of the results.
      scratch: shared memory per block.
    """
    queries, keys = sides
    dtypes = {queries.vectors.dtype, keys.vectors.dtype}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float16")}:
        raise ValueError(
            f"implementation='pallas_gpu' needs bfloat16 or float16 on both sides, not "
            f"{' with '.join(sorted(map(str, dtypes)))}; cast the embeddings, or use 'tiled'"
        )
    if queries.labels.guide is not None:
        raise ValueError("implementation='pallas_gpu' does not support guides; use 'tiled'")
    down, across = _blocks(queries, keys)
    labels = ((as_columns(queries), values[0]), (as_rows(keys), values[1]))
    leaves = [_as_numbers(leaf).reshape(-1) for leaf in jax.tree.leaves(labels)]
    bools = [leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(labels)]
    treedef: Any = jax.tree.structure(labels)
    num_query_leaves = len(jax.tree.leaves(labels[0]))
    features = queries.vectors.shape[1]

    def kernel(vectors: Any, others: Any, *references: Any) -> None:
        i, j = lax.axis_index("down"), lax.axis_index("across")
        similarity = _product(vectors, others, i, j, features)
        spread = [
            _spread(reference, is_bool, *((i, 0) if number < num_query_leaves else (j, 1)))
            for number, (reference, is_bool) in enumerate(zip(references, bools, strict=False))
        ]
        both = treedef.unflatten(spread)
        (query_labels, _), (key_labels, _) = both
        scores, allowed = block_scores(
            similarity, similarity, None, query_labels, key_labels, hardness=hardness
        )
        scores = jnp.where(allowed, scores, -jnp.inf)
        epilogue(scores, both, i, j, references[len(bools) :])

    launch = plgpu.kernel(
        kernel,
        out_type=[shape_like_varying(shape, dtype, leaves[0]) for shape, dtype in results],
        scratch_types=list(scratch),
        grid=(down, across),
        grid_names=("down", "across"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=INTERPRET,
    )
    # `_product` reads the keys as [features, keys]; the copy is cheap compared with the product.
    return launch(queries.vectors, keys.vectors.T, *leaves)


def _product(vectors: Any, others: Any, i: Array, j: Array, features: int) -> Array:
    """Compute the block's inner products, with several chunks of features in flight."""

    def multiplied(accumulator: Any) -> Array:
        def chunk(_: Any, query_chunk: Any, key_chunk: Any) -> None:
            plgpu.wgmma(accumulator, query_chunk, key_chunk)
            plgpu.wgmma_wait(0)

        plgpu.emit_pipeline(
            chunk,
            grid=(features // _CHUNK,),
            in_specs=[
                plgpu.BlockSpec((_BLOCK, _CHUNK), lambda c: (i, c), transforms=_transforms()),
                plgpu.BlockSpec((_CHUNK, _BLOCK), lambda c: (c, j), transforms=_transforms()),
            ],
            max_concurrent_steps=_STAGES,
        )(vectors, others)
        return accumulator[...]

    return pl.run_scoped(multiplied, plgpu.ACC((_BLOCK, _BLOCK), jnp.float32))


def _spread(reference: Any, is_bool: bool, block: Array, axis: int) -> Array:
    """Broadcast one number per row or column to the block, in the layout of the product."""
    # The product's layout with one axis reduced, since elementwise operations need equal layouts.
    window = pl.ds(block * _BLOCK, _BLOCK)
    if INTERPRET is None:
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        values = plgpu.load(reference.at[window], *_WHOLE, layout=layout, optimized=False)
    else:  # the interpreter has no layouts
        values = reference[window]
    spread = lax.broadcast_in_dim(values, (_BLOCK, _BLOCK), (axis,))
    return spread != 0 if is_bool else spread


def _as_numbers(leaf: Array) -> Array:
    return leaf.astype(jnp.int32) if leaf.dtype == jnp.bool_ else leaf


def _blocks(queries: PairQueries, keys: PairKeys) -> tuple[int, int]:
    return queries.vectors.shape[0] // _BLOCK, keys.vectors.shape[0] // _BLOCK


def _padded(side: PyTree) -> PyTree:
    """Pad a side to whole blocks of masked rows and to whole chunks of features."""
    num_rows, features = side.vectors.shape
    valid = side.labels.valid
    valid = jnp.ones(num_rows, bool) if valid is None else valid
    side = side._replace(
        vectors=jnp.pad(side.vectors, ((0, 0), (0, -features % _CHUNK))),
        labels=side.labels._replace(valid=valid),
    )
    return jax.tree.map(_padded_rows, side)


def _padded_rows(rows: Array) -> Array:
    missing = -rows.shape[0] % _BLOCK
    return jnp.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1))) if missing else rows


def _in_kernel(function: Callable[..., Array], *arguments: Any) -> Array:
    """Call a function with substitutes for the operations that GPU kernels lack."""
    # This way, reductions need no separate version for this kernel.
    numbers = [argument for argument in arguments if not isinstance(argument, int)]
    options = [argument for argument in arguments if isinstance(argument, int)]
    closed = jax.make_jaxpr(lambda *operands: function(*operands, *options))(*numbers)
    return _evaluated(closed, *numbers)[0]


def _evaluated(closed: Any, *arguments: Any) -> list[Array]:
    values: dict[Any, Any] = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    values |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if called is not None:
            results = _evaluated(called, *operands)
        elif equation.primitive.name in _SUBSTITUTES:
            results = [_SUBSTITUTES[equation.primitive.name](*operands)]
        else:
            result = equation.primitive.bind(*operands, **equation.params)
            results = result if equation.primitive.multiple_results else [result]
        values |= dict(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in closed.jaxpr.outvars]


def _log1p(x: Array) -> Array:
    """log(1 + x) with an error of at most 2e-6; a series near 0, where 1 + x would round x away."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x / 5))))
    return jnp.where(jnp.abs(x) < 0.05, series, jnp.log(1 + x))


_SUBSTITUTES: dict[str, Callable[..., Array]] = {
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": _log1p,
    "stop_gradient": lambda x: x,
}


def _transforms() -> tuple:
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
