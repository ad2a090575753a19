"""The graph of hard negatives: each row's nearest neighbours, and their mass in its loss."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.assignment.place import Place
from jaxcl.ops.grid import length_on_grid, on_grid
from jaxcl.ops.nearest import Nearest, nearest
from jaxcl.ops.pairs.sides import PairLabels
from jaxcl.ops.row_tables import fetch_rows
from jaxcl.ops.varying import as_varying
from jaxcl.ops.vectors import inner_products
from jaxcl.typing import Array, AxisName, Float, Int, Integer, Scalar

__all__ = [
    "UNIT",
    "Affinity",
    "Edges",
    "PairGraph",
    "TwoSided",
    "clustered_graph",
    "exact_graph",
    "segments_of_neighbours",
    "two_sided",
    "weights_within",
]

UNIT = 2**20
"""The integer for a mass of one; the masses of a row sum to less than 2^31."""

_LARGEST_MASS = UNIT // 8
# The largest mass of a neighbour. Without this cap, blocks close 1% less of the gap: a few
# near duplicates then outweigh the many other rows of a batch.

_WEIGHT = 2**14  # a weight of one; gains overflow if 30,000 rows share their only neighbour

_BLOCK = 16_384  # rows, over all devices, whose neighbours are searched at a time


class PairGraph(NamedTuple):
    """The nearest neighbours of each row.

    A mass is a negative's term in the row's softmax sum, divided by the largest term of the sum, in
    units of 1 / `UNIT`.

    Attributes:
      rows: neighbours, by row number in the whole data set; `-1` for none.
      masses: the neighbours' masses.
      own: the mass in any batch of the row, from its positive and random rows.
    """

    rows: Int[Array, "n k"]
    masses: Int[Array, "n k"]
    own: Int[Array, " n"]


class Edges(NamedTuple):
    """The neighbours of this device's rows, with weights.

    Attributes:
      rows: neighbours, by row number in the whole data set; `-1` for none.
      weights: the weight of each neighbour.
    """

    rows: Int[Array, "n k"]
    weights: Int[Array, "n k"]


class TwoSided(NamedTuple):
    r"""Pairs as vectors with inner products $(x_i \cdot y_j + y_i \cdot x_j) / 2$, on the grid.

    Attributes:
      ours: $(x, y)$ of each row, as an anchor.
      theirs: $(y, x)$ of each row, as a negative.
    """

    ours: Float[Array, "n d"]
    theirs: Float[Array, "n d"]


class Affinity(NamedTuple):
    """The parameters that convert similarities to masses.

    Attributes:
      neighbours: neighbours per row.
      temperature: temperature of the loss.
      batch_size: rows of a global batch.
      sample: random rows of `TwoSided.theirs`, the same on all devices. They represent the rows of
        a batch that are not neighbours.
    """

    neighbours: int
    temperature: float | Scalar
    batch_size: int | Integer[Array | np.ndarray, ""]
    sample: Float[Array, "s d"]


def two_sided(queries: Float[Array, "n d"], keys: Float[Array, "n d"]) -> TwoSided:
    """Join queries and keys, of any length, into one vector per row and role."""
    # On the grid before joining, so that both sides have the same length.
    x, y = on_grid(queries), on_grid(keys)
    return TwoSided(on_grid(jnp.concatenate([x, y], 1)), on_grid(jnp.concatenate([y, x], 1)))


def exact_graph(
    pairs: TwoSided, labels: PairLabels, affinity: Affinity, *, axis_name: AxisName | None = None
) -> PairGraph:
    """Build the graph of each row's nearest neighbours among all rows.

    Args:
      pairs: this device's rows.
      labels: which pairs are allowed, for both roles.
      affinity: the number of neighbours and their masses.
      axis_name: mesh axes over which rows are sharded.
    """
    place = Place(axis_name, pairs.ours.shape[0])

    def of_block(rows: tuple[Array, PairLabels, Array]) -> PairGraph:
        anchors, anchor_labels, own = rows
        neighbours = nearest(
            anchors,
            pairs.theirs,
            count=affinity.neighbours,
            query_labels=anchor_labels,
            table_labels=labels,
            axis_name=axis_name,
        )
        return _graph(neighbours, anchors, own, affinity)

    # Block by block: `nearest` gathers the queries of all devices, and all rows would not fit.
    num_blocks = -(-place.num_rows // _BLOCK)
    size = -(-place.here // num_blocks)
    # The last blocks overlap if blocks do not divide the rows; a row in two of them is written
    # twice, with equal values.
    starts = jnp.minimum(jnp.arange(num_blocks) * size, place.here - size)
    rows = starts[:, None] + jnp.arange(size)
    everything = (pairs.ours, labels, _own(pairs))
    blocks = lax.map(
        lambda rows: of_block(jax.tree.map(lambda leaf: leaf[rows], everything)),
        as_varying(rows, pairs),
    )
    return jax.tree.map(
        lambda leaf: jnp.zeros((place.here, *leaf.shape[2:]), leaf.dtype).at[rows].set(leaf), blocks
    )


def clustered_graph(
    pairs: TwoSided,
    labels: PairLabels,
    affinity: Affinity,
    *,
    clusters: Int[Array, "c s"],
    probes: int,
    axis_name: AxisName | None = None,
) -> PairGraph:
    """Build the graph of each row's nearest neighbours in the most similar clusters.

    Other arguments as for `exact_graph`.

    Args:
      clusters: the rows of each cluster, every row once, padded with `-1`. Equal on all devices;
        the number of clusters is a multiple of the number of devices.
      probes: number of clusters to search for each cluster's rows, including itself.
    """
    place = Place(axis_name, pairs.ours.shape[0])
    fetch = functools.partial(fetch_rows, axis_name=axis_name)
    anchor_centres, negative_centres = (_centres(side, clusters, place) for side in pairs)
    empty = (clusters < 0).all(1)

    def of_cluster(number: Integer[Array, ""]) -> PairGraph:
        similarities = jnp.where(
            empty, -jnp.inf, inner_products(anchor_centres[number][None], negative_centres)[0]
        )
        # Infinity, so that a cluster always searches itself.
        probed = lax.top_k(similarities.at[number].set(jnp.inf), min(probes, len(clusters)))[1]
        rows, others = clusters[number], clusters[probed].reshape(-1)
        anchors, anchor_labels, own = fetch((pairs.ours, labels, _own(pairs)), rows)
        negatives, negative_labels = fetch((pairs.theirs, labels), others)
        # Missing rows are fetched as zeros, whose similarity of 0 exceeds negative similarities.
        valid = others >= 0
        if negative_labels.valid is not None:
            valid &= negative_labels.valid
        within = nearest(
            anchors,
            negatives,
            count=affinity.neighbours,
            query_labels=anchor_labels,
            table_labels=negative_labels._replace(valid=valid),
        )
        rows = jnp.where(within.rows >= 0, others[jnp.maximum(within.rows, 0)], -1)
        return _graph(within._replace(rows=rows), anchors, own, affinity)

    # The same number of clusters on each device: `fetch` is a collective, and devices that leave
    # the loop early would keep the others waiting.
    per_device = len(clusters) // place.num_devices
    numbers = place.device * per_device + jnp.arange(per_device, dtype=jnp.int32)
    by_cluster = lax.map(of_cluster, as_varying(numbers, pairs))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), by_cluster)
    # Back from cluster order to row order. Padding rows keep position 0 and a copy of that row's
    # neighbours, which all users of a graph mask by segment or row number.
    members = clusters.reshape(-1)
    position = jnp.zeros(place.num_rows, jnp.int32)
    position = position.at[jnp.where(members >= 0, members, place.num_rows)].set(
        jnp.arange(len(members), dtype=jnp.int32), mode="drop"
    )
    return fetch(flat, place.mine(position))


def segments_of_neighbours(graph: PairGraph | Edges, of_row: Int[Array, " p"]) -> Int[Array, "n k"]:
    """The segment of each neighbour, from the segments of all rows; -1 for no neighbour."""
    return jnp.where(graph.rows >= 0, of_row[jnp.maximum(graph.rows, 0)], -1)


def weights_within(graph: PairGraph, of_row: Int[Array, " p"], place: Place) -> Int[Array, "n k"]:
    """How much of a row's gap each neighbour closes from within its segment, in units of 2^-14.

    The gap of a row is the logarithm of its total mass over the mass in its batch. To first order,
    a neighbour closes its own mass divided by the mass in the row's segment.
    """
    same = segments_of_neighbours(graph, of_row) == place.mine(of_row)[:, None]
    present = graph.own + jnp.where(same, graph.masses, 0).sum(1)
    # The share may exceed 1 if little mass is present; the cap keeps sums of weights in int32.
    share = graph.masses.astype(jnp.float32) / jnp.maximum(present, 1).astype(jnp.float32)[:, None]
    return jnp.round(jnp.minimum(share, 1) * _WEIGHT).astype(jnp.int32)


def _own(pairs: TwoSided) -> Float[Array, " n"]:
    return (pairs.ours * pairs.theirs).sum(1)


def _centres(
    vectors: Float[Array, "n d"], clusters: Int[Array, "c s"], place: Place
) -> Float[Array, "c d"]:
    """Each cluster's mean, on the grid."""
    number = jnp.broadcast_to(jnp.arange(len(clusters))[:, None], clusters.shape)
    of_row = jnp.full(place.num_rows, len(clusters), jnp.int32)  # out of range, for padding
    of_row = of_row.at[jnp.where(clusters >= 0, clusters, place.num_rows)].set(number, mode="drop")
    integers = vectors.astype(jnp.int32)  # integer sums are the same on any number of devices
    sums = jax.ops.segment_sum(integers, place.mine(of_row), len(clusters))
    return on_grid(place.total(sums).astype(jnp.float32))


def _graph(
    nearest_rows: Nearest, anchors: Float[Array, "q d"], own: Float[Array, " q"], affinity: Affinity
) -> PairGraph:
    similarities, present = nearest_rows.similarities, nearest_rows.rows >= 0
    # Relative to the largest term, since exponentials would overflow at low temperatures.
    largest = jnp.maximum(own, similarities[:, 0])[:, None]
    scale = affinity.temperature * length_on_grid(anchors.shape[1]) ** 2

    def mass(products: Float[Array, "q s"], unit: int) -> Int[Array, "q s"]:
        return jnp.round(unit * jnp.exp((products - largest) / scale)).astype(jnp.int32)

    masses = jnp.where(present, jnp.minimum(mass(similarities, UNIT), _LARGEST_MASS), 0)
    # Neighbours have masses already. If the sample contains a neighbour, it gets at most the mass
    # of the last neighbour.
    least = jnp.where(present, similarities, largest).min(1, keepdims=True)
    random = mass(jnp.minimum(inner_products(anchors, affinity.sample), least), UNIT).sum(1)
    share = jnp.float32(affinity.batch_size - 1) / affinity.sample.shape[0]
    # In float32 and capped: the int32 sum would overflow when scaled to a large batch.
    rest = jnp.minimum(random.astype(jnp.float32) * share, float(2**29))
    return PairGraph(
        nearest_rows.rows,
        masses,
        mass(own[:, None], UNIT)[:, 0] + jnp.round(rest).astype(jnp.int32),
    )
