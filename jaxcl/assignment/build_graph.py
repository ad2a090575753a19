"""Build the neighbour graph of a data set from its settings, sharded over the devices."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.assignment.bisection import bisect
from jaxcl.assignment.gcbs_settings import Gcbs
from jaxcl.assignment.graph import (
    Affinity,
    PairGraph,
    TwoSided,
    clustered_graph,
    exact_graph,
    two_sided,
)
from jaxcl.assignment.place import Place
from jaxcl.assignment.sizes import Sizes
from jaxcl.ops.grid import length_on_grid, on_grid
from jaxcl.ops.pairs.sides import PairLabels
from jaxcl.typing import Array, Float, Int, Key, Scalar

__all__ = ["graph_of"]

_SAMPLE = 512  # random rows used to estimate the mass of an average batch


def graph_of(
    queries: Float[Array, "n d"],
    keys: Float[Array, "n d"],
    keep_apart: tuple[Int[Array, " n"], ...],
    *,
    sizes: Sizes,
    capacity: int,
    temperature: Scalar,
    settings: Gcbs,
    key: Key[Array, ""],
    place: Place,
) -> tuple[PairGraph, Float[Array, "n d"]]:
    """Build the graph of this device's rows, and place the rows on the grid.

    Args:
      queries: one embedding per row of this device.
      keys: the keys of these rows.
      keep_apart: labels; rows with an equal label are never neighbours.
      sizes: the number of rows and the clusters' positions, from `sizes_of`.
      capacity: the maximum number of rows, which determines the number of clusters.
      temperature: temperature of the loss.
      settings: the graph's parameters.
      key: draws the sample and the clusters' initial directions.
      place: this device's range of rows.
    """
    sample_key, cluster_key = jax.random.split(key)
    finite = (jnp.isfinite(queries) & jnp.isfinite(keys)).all(1, keepdims=True)
    queries, keys = jnp.where(finite, queries, 0), jnp.where(finite, keys, 0)
    pairs = two_sided(queries, keys)
    # Put each side on the grid first; otherwise the longer one would dominate the sum.
    points = on_grid(on_grid(queries) + on_grid(keys))
    numbers = place.first + jnp.arange(place.here, dtype=jnp.int32)
    # A row of zeros was not finite, or is an instance-bank slot that no batch has written yet.
    valid = (numbers < sizes.num_rows) & (points != 0).any(1)
    labels = PairLabels(different=(numbers, *keep_apart), valid=valid)
    if settings.similarity_cap is not None:
        # The cap is a cosine, but similarities on the grid are in units of the squared length.
        unit = length_on_grid(pairs.ours.shape[1]) ** 2
        ceiling = jnp.full(place.here, settings.similarity_cap * unit, jnp.float32)
        labels = labels._replace(ceiling=ceiling)
    affinity = Affinity(
        settings.neighbours,
        temperature,
        sizes.batch_size,
        _sample(pairs, sizes.num_rows, sample_key, place),
    )
    if sizes.clusters is None:
        return exact_graph(pairs, labels, affinity, axis_name=place.axis_name), points
    order = bisect(
        points,
        None,
        starts=sizes.clusters,
        key=cluster_key,
        effort=settings.effort,
        axis_name=place.axis_name,
    )
    # Every device gets the same number of clusters; extra clusters are empty. The clusters have
    # room for all rows, so the slice below only cuts off padding.
    num_clusters = -(-capacity // settings.cluster_size)
    num_clusters += -num_clusters % place.num_devices
    order = jnp.where(jnp.arange(place.num_rows) < sizes.num_rows, order, -1)
    missing = num_clusters * settings.cluster_size - place.num_rows
    clusters = jnp.pad(order, (0, max(missing, 0)), constant_values=-1)
    clusters = clusters[: num_clusters * settings.cluster_size].reshape(num_clusters, -1)
    graph = clustered_graph(
        pairs,
        labels,
        affinity,
        clusters=clusters,
        probes=settings.probes,
        axis_name=place.axis_name,
    )
    return graph, points


def _sample(
    pairs: TwoSided, num_rows: Int[Array | np.ndarray, ""], key: Key[Array, ""], place: Place
) -> Float[Array, "s d"]:
    """Draw random rows, the same on all devices."""
    # Each row is nonzero only on the device that holds it, so the sum communicates just the sample.
    rows = jax.random.randint(key, (_SAMPLE,), 0, num_rows) - place.first
    here = (rows >= 0) & (rows < place.here)
    values = pairs.theirs[jnp.where(here, rows, 0)]
    return place.total(jnp.where(here[:, None], values, 0))
