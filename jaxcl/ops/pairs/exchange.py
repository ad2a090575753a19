"""The ring: each device compares its queries with the keys of one device at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.ops.collectives import rotate
from jaxcl.ops.pairs.reductions import Reduced, Reduction, Residuals, nothing
from jaxcl.ops.pairs.sides import PairKeys, PairQueries
from jaxcl.ops.varying import full_like_varying
from jaxcl.typing import Array, AxisName, Float, PyTree

__all__ = ["TilePasses", "ring_backward", "ring_forward"]


class TilePasses(NamedTuple):
    """The two passes of an implementation on one device.

    Attributes:
      forward: a function like `tiled.forward`.
      backward: a function like `tiled.backward`.
      hardness: weight of the constant similarity in the scores.
      tile: rows and columns per tile.
    """

    forward: Callable
    backward: Callable
    hardness: float
    tile: int

    def reduce(self, reduction: Reduction, queries: PairQueries, keys: PairKeys) -> Reduced:
        """Reduce every row and every column of this device's matrix."""
        return self.forward(reduction, queries, keys, hardness=self.hardness, tile=self.tile)

    def differentiate(
        self, reduction: Reduction, residuals: Residuals, cotangents: Reduced
    ) -> tuple[Array, Array, Array, Array]:
        """Compute the gradients of query vectors, scales, key vectors and biases."""
        return self.backward(
            reduction, residuals, cotangents, hardness=self.hardness, tile=self.tile
        )


def ring_forward(
    passes: TilePasses,
    reduction: Reduction,
    queries: PairQueries,
    keys: PairKeys,
    axis_name: AxisName,
) -> Reduced:
    """Reduce this device's rows over all keys, and this device's columns over all queries.

    The keys travel around the ring, together with their columns' partial results.
    """
    rows, columns = nothing(reduction, queries, keys)

    def combine(visitors: PairKeys, columns: Array, rows: Array) -> tuple[Array, Array]:
        more_rows, more_columns = passes.reduce(reduction, queries, visitors)
        return reduction.join(columns, more_columns), reduction.join(rows, more_rows)

    columns, rows = _around_the_ring(combine, keys, columns, rows, axis_name)
    return rows, columns


def ring_backward(
    passes: TilePasses,
    reduction: Reduction,
    residuals: Residuals,
    cotangents: Reduced,
    axis_name: AxisName,
) -> tuple[Float[Array, "q d"], Float[Array, " q"], Float[Array, "k d"], Float[Array, " k"]]:
    """Compute the gradients of query vectors, scales, key vectors and biases.

    The keys travel around the ring again, followed by their gradients, which return to the device
    that owns the keys.
    """
    queries, keys, (rows, columns) = residuals
    row_cotangents, column_cotangents = cotangents
    wide = rows.dtype

    # Sum over devices in float32 or wider, even for bfloat16 vectors.
    def zeros(array: Array) -> Array:
        return full_like_varying(array.shape, 0.0, wide, (queries, keys))

    def combine(visitors: tuple, to_visitors: tuple, to_ours: tuple) -> tuple[tuple, tuple]:
        their_keys, their_values, their_cotangents = visitors
        to_vectors, to_scales, to_keys, to_biases = passes.differentiate(
            reduction,
            Residuals(queries, their_keys, (rows, their_values)),
            (row_cotangents, their_cotangents),
        )
        return (
            jax.tree.map(jnp.add, to_visitors, (to_keys, to_biases)),
            jax.tree.map(jnp.add, to_ours, (to_vectors, to_scales)),
        )

    to_visitors, to_ours = _around_the_ring(
        combine,
        (keys, columns, column_cotangents),
        (zeros(keys.vectors), zeros(columns)),
        (zeros(queries.vectors), zeros(rows)),
        axis_name,
    )
    return *to_ours, *to_visitors


def _around_the_ring(
    combine: Callable,
    visitors: PyTree,
    visitor_results: PyTree,
    local_results: PyTree,
    axis_name: AxisName,
) -> tuple[PyTree, PyTree]:
    """Send visitors around the ring, with results that travel along and results that stay.

    Args:
      combine: (visitors, visitor_results, local_results) -> new (visitor_results, local_results).
      visitors: this device's inputs, which visit every device.
      visitor_results: the visitors' results, which travel with the visitors and return home.
      local_results: this device's results, which stay.
      axis_name: mesh axes that form the ring.
    """

    def visit(_: Array, carry: tuple) -> tuple:
        visitors, visitor_results, local_results = carry
        # Sent before the product, so that the transfer and the product can overlap.
        following = rotate(visitors, axis_name)
        visitor_results, local_results = combine(visitors, visitor_results, local_results)
        return following, rotate(visitor_results, axis_name), local_results

    visitors, visitor_results, local_results = lax.fori_loop(
        0, lax.axis_size(axis_name) - 1, visit, (visitors, visitor_results, local_results)
    )
    # Outside the loop, since the last visitors are not sent on; only their results are rotated once
    # more, and so return home.
    visitor_results, local_results = combine(visitors, visitor_results, local_results)
    return rotate(visitor_results, axis_name), local_results
