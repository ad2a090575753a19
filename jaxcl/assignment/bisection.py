"""Balanced blocks of rows that are hard negatives of each other, by recursive bisection.

Every level splits all segments at once, in three steps. The first cut runs across the direction in
which a segment's rows vary most. A random walk on the graph then moves the cut to where few edges
cross it, since rows in the same direction need not be neighbours. Finally, swaps between the halves
bring more of the loss's mass inside each half. The last levels try several starts and keep the best
cut of each segment.

All decisions compare integers, whose sums do not depend on their order. The blocks are therefore
the same on any number of devices.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.assignment.graph import Edges, PairGraph, segments_of_neighbours, weights_within
from jaxcl.assignment.place import Place
from jaxcl.assignment.swaps import Segments, most_first, refine, segments_of, swap
from jaxcl.ops.grid import on_grid
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Bool, Float, Int, Integer, Key, Range, check_ranges

__all__ = ["DEFAULT_EFFORT", "Effort", "bisect"]

_LAST_LEVELS = (
    6  # levels with several starts; at earlier levels, more starts cost time and do not help
)
_LARGE = 1_024  # rows; smaller segments get half the starts, since swaps repair their cuts
_SPREAD = 2**9  # the mean magnitude of a walk's values
_FARTHEST = 2**11  # the largest magnitude of a walk's values; sums in `_walked` then fit in int32


class Effort(NamedTuple):
    """The search effort for good blocks.

    Attributes:
      starts: random initial directions per split in the last six levels, and half as many where
        segments have fewer than 1,024 rows. Each segment keeps the cut with the most weight inside.
      directions: power-iteration steps to find the direction of a split.
      walks: steps of the random walk that follows; 0 for none.
      swaps: rounds of swaps after a split.
      refinements: rounds of swaps between any two blocks, after the last level.
      eagerness: the fraction of profitable swaps that each round makes.
    """

    starts: Annotated[int, Range(least=1)] = 6
    directions: Annotated[int, Range(least=0)] = 3
    walks: Annotated[int, Range(least=0)] = 12
    swaps: Annotated[int, Range(least=0)] = 8
    refinements: Annotated[int, Range(least=0)] = 24
    eagerness: Annotated[float, Range(above=0, most=1)] = 0.7

    def check(self) -> None:
        """Raise a `ValueError` if a value is out of range."""
        check_ranges(self)


DEFAULT_EFFORT = Effort()


def bisect(
    points: Float[Array, "n d"],
    graph: PairGraph | None,
    *,
    starts: Int[Array | np.ndarray, "l s"],
    key: Key[Array, ""],
    effort: Effort = DEFAULT_EFFORT,
    axis_name: AxisName | None = None,
) -> Int[Array, " p"]:
    """Order the rows so that each block's rows are hard negatives of each other.

    Args:
      points: this device's rows, on the grid of `jaxcl.ops.grid.on_grid`; the first cuts group
        them by distance.
      graph: each row's nearest neighbours, for the walks and swaps; `None` to cut by direction
        only.
      starts: the first position of each segment, level by level, from `segment_starts`; the last
        level's segments are the blocks. Later positions are padding.
      key: draws the initial directions and the swaps.
      effort: the search effort.
      axis_name: mesh axes of an enclosing `jax.shard_map` over which rows are sharded.

    Returns:
      The row numbers of all devices, block by block, identical on every device.
    """
    place = Place(axis_name, points.shape[0])
    # The barrier prevents constant folding: XLA would otherwise evaluate cumulative sums over all
    # positions at compile time.
    table = lax.optimization_barrier(jnp.asarray(starts))
    last = table.shape[0] - 1
    split_key, swap_key, refine_key = jax.random.split(key, 3)
    points = points.astype(jnp.int16)  # coordinates of the grid are at most 2^12

    def level(number: Integer[Array, ""] | int, order: Array) -> Array:
        segments = segments_of(table[number], place.num_rows)
        halves = segments_of(table[number + 1], place.num_rows)
        large = jnp.diff(table[number]).max() >= _LARGE
        starts = jnp.where(large, effort.starts, -(-effort.starts // 2))
        order = _split(
            points,
            graph,
            order,
            segments,
            halves,
            starts=jnp.where(number >= last - _LAST_LEVELS, starts, 1),
            effort=effort,
            key=jax.random.fold_in(split_key, number),
            place=place,
        )
        if graph is None:
            return order
        siblings = jnp.arange(halves.number, dtype=jnp.int32) ^ 1  # halves are 2 s and 2 s + 1
        return swap(
            graph,
            order,
            halves,
            siblings,
            rounds=effort.swaps,
            eagerness=effort.eagerness,
            key=jax.random.fold_in(swap_key, number),
            place=place,
        )

    order = jnp.arange(place.num_rows, dtype=jnp.int32)
    order = lax.fori_loop(0, last, level, order)
    if graph is None or not last:
        return order
    return refine(
        graph,
        order,
        segments_of(table[last], place.num_rows),
        rounds=effort.refinements,
        eagerness=effort.eagerness,
        key=refine_key,
        place=place,
    )


def _split(
    points: Int[Array, "n d"],
    graph: PairGraph | None,
    order: Int[Array, " p"],
    segments: Segments,
    halves: Segments,
    *,
    starts: Integer[Array, ""] | int,
    effort: Effort,
    key: Key[Array, ""],
    place: Place,
) -> Int[Array, " p"]:
    """Order each segment's rows so that little weight crosses the cut between its halves."""
    of_row = segments.of_row(order)
    segment = place.mine(of_row)

    def along(number: Integer[Array, ""] | int) -> Int[Array, " p"]:
        start_key = jax.random.fold_in(key, number)
        return place.everyone(
            _along(points, segment, segments, steps=effort.directions, key=start_key, place=place)
        )

    def ordered(values: Int[Array, " p"]) -> Int[Array, " p"]:
        return lax.sort((segments.of_position, values[order], order), num_keys=2)[2]

    if graph is None:
        return ordered(along(0))

    def by_walk(values: Int[Array, " p"]) -> Int[Array, " p"]:
        # `most_first` has its best resolution near zero, where walks are centred. It sorts one
        # array instead of three, which is many times faster.
        return order[most_first(-values[order], segments)]

    inside = segments_of_neighbours(graph, of_row) == segment[:, None]
    weights = jnp.where(inside, weights_within(graph, of_row, place), 0)
    edges = Edges(graph.rows, weights)
    part = _Part(jnp.zeros((place.here, 1), jnp.int32), segment, jnp.diff(segments.starts), place)
    padding = jnp.zeros(1, bool)  # padding belongs to the segment after the last one

    def kept(order: Int[Array, " p"]) -> Float[Array, " s"]:
        """The weight of each segment's edges that its halves do not cut."""
        half = halves.of_row(order)
        together = segments_of_neighbours(graph, half) == place.mine(half)[:, None]
        # A row's weights add up to about 2^14. Shifted by three bits they stay below 2^12, the
        # limit of `_Part.sums`, rounding included.
        of_rows = jnp.where(together, weights, 0).sum(1, keepdims=True) >> 3
        return part._replace(points=of_rows).sums(jnp.ones_like(segment, bool))[:, 0]

    def start(number: Integer[Array, ""] | int, best: tuple[Array, Array]) -> tuple[Array, Array]:
        order, most = best
        walked = _walked(edges, along(number), of_row, segments, steps=effort.walks, place=place)
        candidate = by_walk(walked) if effort.walks else ordered(walked)
        weight = kept(candidate)
        # Segments choose their starts independently; ties go to the earliest start.
        better = jnp.append(weight > most, padding)[segments.of_position]
        return jnp.where(better, candidate, order), jnp.maximum(weight, most)

    none = jnp.full(segments.number, -1, jnp.float32)
    return lax.fori_loop(0, starts, start, (order, none))[0]


def _along(
    points: Int[Array, "n d"],
    segment: Int[Array, " n"],
    segments: Segments,
    *,
    steps: int,
    key: Key[Array, ""],
    place: Place,
) -> Int[Array, " n"]:
    """How far each row lies along its segment's direction.

    Each step cuts a segment at its mean along the direction. The difference between the means of
    the two parts is the next direction. This power iteration on signs needs only integer sums.
    """
    # Process at most as many segments at a time as this device has rows: the directions of all
    # segments at once would take as much memory as the rows of many devices.
    num_chunks = -(-segments.number // place.here)
    chunk = -(-segments.number // num_chunks)
    sizes = jnp.diff(segments.starts)

    def of_chunk(number: Integer[Array, ""] | int, result: Array) -> Array:
        # The last chunk overlaps the previous one if chunks do not divide, and recomputes the same
        # values.
        first = jnp.minimum(number * chunk, segments.number - chunk)
        inside = (segment >= first) & (segment < first + chunk)
        part = _Part(
            points,
            jnp.where(inside, segment - first, chunk),
            lax.dynamic_slice_in_dim(sizes, first, chunk),
            place,
        )
        everything = part.sums(inside)
        # Both vectors are at most about 2^12 long, so `middle` is near 2^24 and fits in int32.
        mean = jnp.round(everything / part.counts).astype(jnp.int32)

        def step(_: Integer[Array, ""] | int, direction: Array) -> Array:
            middle = (mean * direction.astype(jnp.int32)).sum(1)
            above = inside & (part.along(direction) > jnp.append(middle, 0)[part.segment])
            upper, num_upper = part.sums(above), part.number(above)
            lower = everything - upper
            difference = upper / jnp.maximum(num_upper, 1) - lower / jnp.maximum(
                part.counts - num_upper, 1
            )
            return on_grid(difference)

        # One key per segment, not per chunk: the chunk size depends on the number of devices.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(chunk))
        random = jax.vmap(lambda key: jax.random.normal(key, points.shape[1:]))(keys)
        direction = lax.fori_loop(0, steps, step, on_grid(random))
        return jnp.where(inside, part.along(direction), result)

    nothing = as_varying(jnp.zeros(place.here, jnp.int32), points)
    if num_chunks == 1:
        return of_chunk(0, nothing)
    return lax.fori_loop(0, num_chunks, of_chunk, nothing)


def _walked(
    edges: Edges,
    along: Int[Array, " p"],
    of_row: Int[Array, " p"],
    segments: Segments,
    *,
    steps: int,
    place: Place,
) -> Int[Array, " p"]:
    """How far each row lies along a direction, after a walk on the graph within its segment.

    Weights are 0 for neighbours outside the row's segment.

    Each step replaces a row's value by a quarter of it plus the weighted mean over the row's edges
    in both directions. Without the quarter, two rows that are each other's only neighbour would
    swap values forever. Then each segment's values are centred and scaled. They converge to the cut
    that separates the least weight. A few steps are enough; many would single out a few poorly
    connected rows (Lin and Cohen, "Power iteration clustering", ICML 2010).
    """
    if not steps:
        return along
    # With weights up to 2^8 and values up to 2^11, almost 4,096 of the largest products sum to less
    # than 2^31. The sum of a row with more edges may overflow, which only worsens its position.
    largest = place.everyone(edges.weights.max(1)).max()
    weights = edges.weights >> jnp.maximum(32 - lax.clz(jnp.maximum(largest - 1, 0)) - 8, 0)
    neighbours = jnp.maximum(edges.rows, 0)  # a missing neighbour has the weight 0
    sizes = jnp.diff(segments.starts)
    alone = Place(
        None, place.num_rows
    )  # every device holds all values, so sums need no communication

    def total(values: Int[Array, " p"]) -> Int[Array, " p"]:
        sums = as_varying(jnp.zeros(place.num_rows, jnp.int32), weights)
        sums = sums.at[neighbours].add(weights * place.mine(values)[:, None])
        mine = place.mine(sums) + (weights * values[neighbours]).sum(1)
        return place.total(lax.dynamic_update_slice_in_dim(sums, mine, place.first, 0))

    def mean(values: Int[Array, " p"]) -> Float[Array, " p"]:
        """The mean of each row's segment; 0 for padding."""
        part = _Part(values[:, None], of_row, sizes, alone)
        means = part.sums(jnp.ones_like(of_row, bool)) / part.counts
        return jnp.append(means[:, 0], 0)[of_row]

    def level(values: Int[Array, " p"]) -> Int[Array, " p"]:
        """Values centred and scaled to the same spread in each segment."""
        centred = values - jnp.round(mean(values)).astype(jnp.int32)
        scale = _SPREAD / jnp.maximum(mean(jnp.abs(centred)), 1)
        return jnp.clip(jnp.round(centred * scale), -_FARTHEST, _FARTHEST).astype(jnp.int32)

    degree = jnp.maximum(total(jnp.ones_like(along)), 1).astype(jnp.float32)

    def step(_: Integer[Array, ""] | int, values: Array) -> Array:
        nearby = jnp.round(total(values).astype(jnp.float32) / degree)
        return level((values >> 2) + nearby.astype(jnp.int32))

    # Products are at most 2^24, and 2^11 after the shift, which `mean` can sum.
    return lax.fori_loop(0, steps, step, level(along >> 13))


class _Part(NamedTuple):
    """The rows of a range of segments.

    Attributes:
      points: this device's rows.
      segment: each row's index into `sizes`; `len(sizes)` for rows of other segments.
      sizes: number of rows of each segment, over all devices.
      place: this device's range of rows.
    """

    points: Int[Array, "n d"]
    segment: Int[Array, " n"]
    sizes: Int[Array, " s"]
    place: Place

    @property
    def counts(self) -> Float[Array, "s 1"]:
        """The segments' sizes, as divisors."""
        return jnp.maximum(self.sizes, 1).astype(jnp.float32)[:, None]

    def sums(self, selected: Bool[Array, " n"]) -> Float[Array, "s d"]:
        """Each segment's sum over the selected rows of all devices.

        Coordinates are at most 2^12, so fewer than 2^19 rows sum to less than 2^31. Larger segments
        drop as many low bits as necessary.
        """
        bit_length = 32 - lax.clz(self.sizes)
        shift = jnp.maximum(0, bit_length - 19)
        of_row = jnp.append(shift, 0)[self.segment][:, None]
        values = jnp.where(selected[:, None], self.points.astype(jnp.int32) >> of_row, 0)
        return self._total(values).astype(jnp.float32) * (1 << shift).astype(jnp.float32)[:, None]

    def number(self, selected: Bool[Array, " n"]) -> Float[Array, "s 1"]:
        """The number of selected rows in each segment."""
        return self._total(selected.astype(jnp.int32)).astype(jnp.float32)[:, None]

    def along(self, direction: Float[Array, "s d"]) -> Int[Array, " n"]:
        """Each row's inner product with its segment's direction."""
        padded = jnp.pad(direction.astype(jnp.int32), ((0, 1), (0, 0)))
        return (self.points.astype(jnp.int32) * padded[self.segment]).sum(1)

    def _total(self, values: Int[Array, "n ..."]) -> Int[Array, "s ..."]:
        number = self.sizes.shape[0]  # an extra slot collects the rows of other segments
        return self.place.total(jax.ops.segment_sum(values, self.segment, number + 1)[:number])
