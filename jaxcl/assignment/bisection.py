"""Balanced blocks of rows that are each other's hard negatives, by recursive bisection.

Every level splits all segments at once, in three steps: along the direction in which a segment's
rows differ most; along what a random walk on the graph makes of that, since what lies in one
direction need not hang together; and by swaps between the halves that bring more of the loss's mass
together. In the last levels the first two begin several times, and each segment takes its best cut.

Whole numbers decide everything, so that the blocks are the same on any number of devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.assignment.graph import PairGraph, segments_of_neighbours, weights_within
from jaxcl.assignment.place import Place
from jaxcl.assignment.swaps import Segments, most_first, refine, segments_of, swap
from jaxcl.ops.grid import on_grid
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, AxisName, Bool, Float, Int, Integer, Key

__all__ = ["DEFAULT_EFFORT", "Effort", "bisect"]

_LAST_LEVELS = 6  # begin several times: above them, starts take their time and gain nothing
_LARGE = 1_024  # rows of a segment: smaller ones begin half as often, since swaps mend their cuts
_SPREAD = 2**9  # the mean magnitude of a walk's values
_FARTHEST = 2**11  # the greatest


class Effort(NamedTuple):
    """How long the blocks are searched for.

    Attributes:
      starts: random directions with which a split begins, in the last six levels, and half as many
        where segments have less than 1,024 rows; each takes the cut that keeps most weight
        together.
      directions: steps towards the direction of a split.
      walks: steps of the random walk from there; 0 for none.
      swaps: rounds of swaps after a split.
      refinements: rounds of swaps between any blocks, in the end.
      eagerness: the share of the swaps worth making that a round makes.
    """

    starts: int = 6
    directions: int = 3
    walks: int = 12
    swaps: int = 8
    refinements: int = 24
    eagerness: float = 0.7

    def check(self) -> None:
        """Raises a `ValueError` for what cannot be."""
        least = {"starts": 1, "directions": 0, "walks": 0, "swaps": 0, "refinements": 0}
        for name, count in least.items():
            if getattr(self, name) < count:
                raise ValueError(f"{name}={getattr(self, name)}; it is at least {count}")
        if not 0 < self.eagerness <= 1:
            raise ValueError(f"eagerness={self.eagerness}; it lies above 0, up to 1")


DEFAULT_EFFORT = Effort()


def bisect(
    points: Float[Array, "n d"],
    graph: PairGraph | None,
    *,
    num_rows: int,
    block_size: int,
    key: Key[Array, ""],
    effort: Effort = DEFAULT_EFFORT,
    axis_name: AxisName | None = None,
) -> Int[Array, " p"]:
    """Orders the rows so that each `block_size` of them belong together.

    Args:
      points: this device's rows, on the grid of `jaxcl.ops.grid.on_grid`; what lies close is first
        put together.
      graph: the rows' nearest, for the walks and swaps; `None` for directions alone.
      num_rows: of all devices; rows behind them are padding, and come last.
      block_size: rows of a block; the last one may be shorter.
      key: of the first directions, and of which swaps are made.
      effort: how long to search.
      axis_name: mesh axes of an enclosing `jax.shard_map` over which rows are sharded.

    Returns:
      Row numbers of all devices, block after block, the same on every device.
    """
    place = Place(axis_name, points.shape[0])
    # Behind a barrier, since XLA would fold sums over all positions while it compiles.
    table = lax.optimization_barrier(jnp.asarray(_starts(num_rows, block_size)))
    last = table.shape[0] - 1
    split_key, swap_key, refine_key = jax.random.split(key, 3)
    points = points.astype(jnp.int16)

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
        siblings = jnp.arange(halves.number, dtype=jnp.int32) ^ 1
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


def _starts(num_rows: int, block_size: int) -> Int[np.ndarray, "l s"]:
    """Where each level's segments begin, halves behind each other; `[levels + 1, segments + 1]`.

    Segment `s` of one level is `2 s` and `2 s + 1` of the next. All but the last hold whole blocks;
    a segment of one block has an empty second half.
    """
    blocks = np.array([-(-num_rows // block_size)])
    levels = [blocks]
    while blocks.max() > 1:
        blocks = np.stack([blocks - blocks // 2, blocks // 2], axis=1).ravel()
        levels.append(blocks)
    table = np.full((len(levels), len(blocks) + 1), num_rows, np.int32)
    for row, blocks in zip(table, levels, strict=True):
        row[0] = 0
        row[1 : len(blocks) + 1] = np.minimum(np.cumsum(blocks) * block_size, num_rows)
    return table


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
    """Orders each segment's rows so that the halves keep together what belongs together."""
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
        # They lie around zero, where `most_first` tells them apart, and sorts many times faster.
        return order[most_first(-values[order], segments)]

    inside = segments_of_neighbours(graph, of_row) == segment[:, None]
    weights = jnp.where(inside, weights_within(graph, of_row, place), 0)
    part = _Part(jnp.zeros((place.here, 1), jnp.int32), segment, jnp.diff(segments.starts), place)
    padding = jnp.zeros(1, bool)

    def kept(order: Int[Array, " p"]) -> Float[Array, " s"]:
        """What the halves of each segment keep of its weight."""
        half = halves.of_row(order)
        together = segments_of_neighbours(graph, half) == place.mine(half)[:, None]
        # A row's weights add up to one, and what rounding adds: to 2^12 at most.
        of_rows = jnp.where(together, weights, 0).sum(1, keepdims=True) >> 3
        return part._replace(points=of_rows).sums(jnp.ones_like(segment, bool))[:, 0]

    def start(number: Integer[Array, ""] | int, best: tuple[Array, Array]) -> tuple[Array, Array]:
        order, most = best
        walked = _walked(
            graph, weights, along(number), of_row, segments, steps=effort.walks, place=place
        )
        found = by_walk(walked) if effort.walks else ordered(walked)
        now = kept(found)
        better = jnp.append(now > most, padding)[segments.of_position]
        return jnp.where(better, found, order), jnp.maximum(now, most)

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

    A step cuts a segment at the middle of its direction, and takes the difference between the means
    of both parts as the next: the sign of a power iteration's, which needs no more than whole sums.
    """
    # No more segments at a time than this device has rows, so that it holds no more than its share.
    num_chunks = -(-segments.number // place.here)
    chunk = -(-segments.number // num_chunks)
    sizes = jnp.diff(segments.starts)

    def of_chunk(number: Integer[Array, ""] | int, found: Array) -> Array:
        # The last chunk begins earlier if need be, and finds the same once more.
        first = jnp.minimum(number * chunk, segments.number - chunk)
        inside = (segment >= first) & (segment < first + chunk)
        part = _Part(
            points,
            jnp.where(inside, segment - first, chunk),
            lax.dynamic_slice_in_dim(sizes, first, chunk),
            place,
        )
        everything = part.sums(inside)
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

        # One key per segment: how many a device looks at together changes nothing.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(chunk))
        random = jax.vmap(lambda key: jax.random.normal(key, points.shape[1:]))(keys)
        direction = lax.fori_loop(0, steps, step, on_grid(random))
        return jnp.where(inside, part.along(direction), found)

    nothing = as_varying(jnp.zeros(place.here, jnp.int32), points)
    if num_chunks == 1:
        return of_chunk(0, nothing)
    return lax.fori_loop(0, num_chunks, of_chunk, nothing)


def _walked(
    graph: PairGraph,
    weights: Int[Array, "n k"],
    along: Int[Array, " p"],
    of_row: Int[Array, " p"],
    segments: Segments,
    *,
    steps: int,
    place: Place,
) -> Int[Array, " p"]:
    """How far each row lies along a direction, after a walk on the graph within its segment.

    `weights` are of the neighbours in the row's segment, 0 of others.

    Each step gives a row the weighted mean of its neighbours' values and of those whose neighbour
    it is, and a quarter of its own, without which two rows that have but each other would exchange
    theirs for ever; and then centres and scales each segment's values. So they go towards the cut
    that parts least of the weight, and stop before they tell nothing but a few rows apart that
    hardly hang on the others (Lin and Cohen, "Power iteration clustering", ICML 2010).
    """
    if not steps:
        return along
    # At most 2^8, so that almost 4,096 of the greatest weight and value add up below 2^31; where
    # more do, a row's value is wrong, and its place no more than another one.
    greatest = place.everyone(weights.max(1)).max()
    weights >>= jnp.maximum(32 - lax.clz(jnp.maximum(greatest - 1, 0)) - 8, 0)
    neighbours = jnp.maximum(graph.rows, 0)
    sizes = jnp.diff(segments.starts)
    alone = Place(None, place.num_rows)  # all devices know all values

    def total(values: Int[Array, " p"]) -> Int[Array, " p"]:
        sums = as_varying(jnp.zeros(place.num_rows, jnp.int32), weights)
        sums = sums.at[neighbours].add(weights * place.mine(values)[:, None])
        mine = place.mine(sums) + (weights * values[neighbours]).sum(1)
        return place.total(lax.dynamic_update_slice_in_dim(sums, mine, place.first, 0))

    def mean(values: Int[Array, " p"]) -> Float[Array, " p"]:
        """The mean of each row's segment; of padding 0."""
        part = _Part(values[:, None], of_row, sizes, alone)
        means = part.sums(jnp.ones_like(of_row, bool)) / part.counts
        return jnp.append(means[:, 0], 0)[of_row]

    def level(values: Int[Array, " p"]) -> Int[Array, " p"]:
        """The values with a mean of zero in each segment, and equal spread."""
        centred = values - jnp.round(mean(values)).astype(jnp.int32)
        scale = _SPREAD / jnp.maximum(mean(jnp.abs(centred)), 1)
        return jnp.clip(jnp.round(centred * scale), -_FARTHEST, _FARTHEST).astype(jnp.int32)

    degree = jnp.maximum(total(jnp.ones_like(along)), 1).astype(jnp.float32)

    def step(_: Integer[Array, ""] | int, values: Array) -> Array:
        nearby = jnp.round(total(values).astype(jnp.float32) / degree)
        return level((values >> 2) + nearby.astype(jnp.int32))

    return lax.fori_loop(0, steps, step, level(along >> 13))  # products are below 2^24


class _Part(NamedTuple):
    """Rows of some segments.

    Attributes:
      points: this device's rows.
      segment: of each row, among those looked at; their number for all others.
      sizes: rows of each segment on all devices.
      place: where this device's rows lie.
    """

    points: Int[Array, "n d"]
    segment: Int[Array, " n"]
    sizes: Int[Array, " s"]
    place: Place

    @property
    def counts(self) -> Float[Array, "s 1"]:
        """Their sizes, as divisors."""
        return jnp.maximum(self.sizes, 1).astype(jnp.float32)[:, None]

    def sums(self, counted: Bool[Array, " n"]) -> Float[Array, "s d"]:
        """Each segment's sum of the counted rows of all devices.

        Coordinates are at most 2^12, so that sums of 2^19 rows fit; of larger segments as many
        of the lowest bits are left out as they need.
        """
        bit_length = 32 - lax.clz(self.sizes)
        shift = jnp.maximum(0, bit_length - 19)
        of_row = jnp.append(shift, 0)[self.segment][:, None]
        values = jnp.where(counted[:, None], self.points.astype(jnp.int32) >> of_row, 0)
        return self._total(values).astype(jnp.float32) * (1 << shift).astype(jnp.float32)[:, None]

    def number(self, counted: Bool[Array, " n"]) -> Float[Array, "s 1"]:
        """How many rows of each segment are counted."""
        return self._total(counted.astype(jnp.int32)).astype(jnp.float32)[:, None]

    def along(self, direction: Float[Array, "s d"]) -> Int[Array, " n"]:
        """Each row's product with its segment's direction."""
        padded = jnp.pad(direction.astype(jnp.int32), ((0, 1), (0, 0)))
        return (self.points.astype(jnp.int32) * padded[self.segment]).sum(1)

    def _total(self, values: Int[Array, "n ..."]) -> Int[Array, "s ..."]:
        number = self.sizes.shape[0]
        return self.place.total(jax.ops.segment_sum(values, self.segment, number + 1)[:number])
