"""Which rows are each other's hardest negatives: a few neighbours for each, and their mass."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    "PairGraph",
    "TwoSided",
    "clustered_graph",
    "exact_graph",
    "segments_of_neighbours",
    "two_sided",
    "weights_within",
]

UNIT = 2**20
"""A mass of one. Masses of all neighbours add up below 2^31."""

_GREATEST = UNIT // 8
# No neighbour's mass counts for more. Blocks that were sought with all of it close 1 % less of the
# gap: near-duplicates then decide, and the many others of a batch do not.

_WEIGHT = 2**14  # a weight of one; gains overflow where 30,000 rows have no neighbour but one row

_BLOCK = 16_384  # rows of all devices whose neighbours are searched for at a time


class PairGraph(NamedTuple):
    """Each row's nearest rows; `-1` where there is none.

    A mass is what a row, as a negative, adds to the sum in the loss of another, relative to the
    greatest term of that sum, in units of 1 / `UNIT`.

    Attributes:
      rows: row numbers in the whole data set.
      masses: of each neighbour.
      own: what is in a row's batch whatever its neighbours are: its positive, and what random rows
        add.
    """

    rows: Int[Array, "n k"]
    masses: Int[Array, "n k"]
    own: Int[Array, " n"]


class TwoSided(NamedTuple):
    r"""Pairs as vectors whose products are $(x_i \cdot y_j + y_i \cdot x_j) / 2$, on the grid.

    Attributes:
      ours: $(x, y)$ of each row.
      theirs: $(y, x)$.
    """

    ours: Float[Array, "n d"]
    theirs: Float[Array, "n d"]


class Affinity(NamedTuple):
    """How similarities become masses.

    Attributes:
      neighbours: how many each row has.
      temperature: of the loss.
      batch_size: of the batches in which rows will meet.
      sample: random rows of `TwoSided.theirs`, the same on all devices: what any batch holds.
    """

    neighbours: int
    temperature: float | Scalar
    batch_size: int
    sample: Float[Array, "s d"]


def two_sided(queries: Float[Array, "n d"], keys: Float[Array, "n d"]) -> TwoSided:
    """Both sides' embeddings, of any length, as one vector per row and role."""
    x, y = on_grid(queries), on_grid(keys)
    return TwoSided(on_grid(jnp.concatenate([x, y], 1)), on_grid(jnp.concatenate([y, x], 1)))


def exact_graph(
    pairs: TwoSided,
    labels: PairLabels,
    affinity: Affinity,
    *,
    axis_name: AxisName | None = None,
) -> PairGraph:
    """The graph of every row's nearest rows among all.

    Args:
      pairs: this device's rows.
      labels: which pairs count, for both roles.
      affinity: how many neighbours there are, and what they weigh.
      axis_name: mesh axes over which rows are sharded.
    """
    place = Place(axis_name, pairs.ours.shape[0])

    def of_block(rows: tuple[Array, PairLabels, Array]) -> PairGraph:
        ours, our_labels, own = rows
        found = nearest(
            ours,
            pairs.theirs,
            count=affinity.neighbours,
            query_labels=our_labels,
            table_labels=labels,
            axis_name=axis_name,
        )
        return _graph(found, ours, own, affinity)

    # Block by block, so that no device holds the others' rows all at once.
    num_blocks = -(-place.num_rows // _BLOCK)
    size = -(-place.here // num_blocks)
    starts = jnp.minimum(jnp.arange(num_blocks) * size, place.here - size)
    rows = starts[:, None] + jnp.arange(size)  # the last ones begin earlier if need be
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
    """The graph of every row's nearest rows in its own cluster and those most like it.

    Args:
      pairs: this device's rows.
      labels: which pairs count, for both roles.
      affinity: how many neighbours there are, and what they weigh.
      clusters: the rows of each, all rows once; `-1` for none. Equal on all devices, which must
        divide their number.
      probes: clusters in which a cluster's rows look, its own among them.
      axis_name: mesh axes over which rows are sharded.
    """
    place = Place(axis_name, pairs.ours.shape[0])
    fetch = functools.partial(fetch_rows, axis_name=axis_name)
    ours, theirs = (_centres(side, clusters, place) for side in pairs)
    empty = (clusters < 0).all(1)

    def of_cluster(number: Integer[Array, ""]) -> PairGraph:
        likeness = jnp.where(empty, -jnp.inf, inner_products(ours[number][None], theirs)[0])
        probed = lax.top_k(likeness.at[number].set(jnp.inf), min(probes, len(clusters)))[1]
        rows, others = clusters[number], clusters[probed].reshape(-1)
        our_rows, our_labels, own = fetch((pairs.ours, labels, _own(pairs)), rows)
        their_rows, their_labels = fetch((pairs.theirs, labels), others)
        there = others >= 0
        if their_labels.valid is not None:
            there &= their_labels.valid
        found = nearest(
            our_rows,
            their_rows,
            count=affinity.neighbours,
            query_labels=our_labels,
            table_labels=their_labels._replace(valid=there),
        )
        neighbours = jnp.where(found.rows >= 0, others[jnp.maximum(found.rows, 0)], -1)
        return _graph(found._replace(rows=neighbours), our_rows, own, affinity)

    per_device = len(clusters) // place.num_devices
    numbers = place.device * per_device + jnp.arange(per_device, dtype=jnp.int32)
    by_cluster = lax.map(of_cluster, as_varying(numbers, pairs))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), by_cluster)
    members = clusters.reshape(-1)
    position = jnp.zeros(place.num_rows, jnp.int32)
    position = position.at[jnp.where(members >= 0, members, place.num_rows)].set(
        jnp.arange(len(members), dtype=jnp.int32), mode="drop"
    )
    return fetch(flat, place.mine(position))


def segments_of_neighbours(graph: PairGraph, of_row: Int[Array, " p"]) -> Int[Array, "n k"]:
    """The segment of each neighbour, by those of all rows; -1 where there is none."""
    return jnp.where(graph.rows >= 0, of_row[jnp.maximum(graph.rows, 0)], -1)


def weights_within(graph: PairGraph, of_row: Int[Array, " p"], place: Place) -> Int[Array, "n k"]:
    """What a row's loss would gain by each neighbour's coming, in units of 2^-14.

    The gap of a row is the log of all mass over that in its batch: its derivative by a neighbour is
    the neighbour's mass over the mass that is there, that of the row's segment.
    """
    same = segments_of_neighbours(graph, of_row) == place.mine(of_row)[:, None]
    there = graph.own + jnp.where(same, graph.masses, 0).sum(1)
    share = graph.masses.astype(jnp.float32) / jnp.maximum(there, 1).astype(jnp.float32)[:, None]
    return jnp.round(jnp.minimum(share, 1) * _WEIGHT).astype(jnp.int32)


def _own(pairs: TwoSided) -> Float[Array, " n"]:
    return (pairs.ours * pairs.theirs).sum(1)


def _centres(
    vectors: Float[Array, "n d"], clusters: Int[Array, "c s"], place: Place
) -> Float[Array, "c d"]:
    """Each cluster's mean, on the grid."""
    number = jnp.broadcast_to(jnp.arange(len(clusters))[:, None], clusters.shape)
    of_row = jnp.full(place.num_rows, len(clusters), jnp.int32)  # of padding: none
    of_row = of_row.at[jnp.where(clusters >= 0, clusters, place.num_rows)].set(number, mode="drop")
    whole = vectors.astype(jnp.int32)
    sums = jax.ops.segment_sum(whole, place.mine(of_row), len(clusters))
    return on_grid(place.total(sums).astype(jnp.float32))


def _graph(
    found: Nearest, ours: Float[Array, "q d"], own: Float[Array, " q"], affinity: Affinity
) -> PairGraph:
    similarities, there = found.similarities, found.rows >= 0
    greatest = jnp.maximum(own, similarities[:, 0])[:, None]
    one = affinity.temperature * length_on_grid(ours.shape[1]) ** 2

    def mass(products: Float[Array, "q s"], unit: int) -> Int[Array, "q s"]:
        return jnp.round(unit * jnp.exp((products - greatest) / one)).astype(jnp.int32)

    masses = jnp.where(there, jnp.minimum(mass(similarities, UNIT), _GREATEST), 0)
    # A random row is no neighbour: those of the sample that are weigh no more than the last one.
    least = jnp.where(there, similarities, greatest).min(1, keepdims=True)
    random = mass(jnp.minimum(inner_products(ours, affinity.sample), least), UNIT).sum(1)
    share = (affinity.batch_size - 1) / affinity.sample.shape[0]
    rest = jnp.minimum(random.astype(jnp.float32) * share, float(2**29))
    return PairGraph(
        found.rows, masses, mass(own[:, None], UNIT)[:, 0] + jnp.round(rest).astype(jnp.int32)
    )
