"""Swaps of rows between segments, by which more of the loss's mass comes into the batches.

The parallel form of Kernighan and Lin, "An efficient heuristic procedure for partitioning graphs",
Bell System Technical Journal, 1970: the rows of two segments are paired by what they would gain
from being in the other one, and pairs that gain together change places at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.assignment.graph import PairGraph, segments_of_neighbours, weights_within
from jaxcl.assignment.place import Place
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, Float, Int, Integer, Key

__all__ = ["Segments", "most_first", "refine", "segments_of", "swap"]

_MATCHING_ROUNDS = 4
_DISTANCES = 3
_ORDERED_BITS = 29  # of what `_ordered` returns


class Segments(NamedTuple):
    """A cut of all positions of an order, equal on all devices.

    Attributes:
      starts: the first position of each segment; of one more, behind which padding lies.
      of_position: the segment of each position. Padding has the number of segments.
    """

    starts: Int[Array, " _"]
    of_position: Int[Array, " p"]

    @property
    def number(self) -> int:
        """How many segments there are, some of them perhaps empty."""
        return self.starts.shape[0] - 1

    def of_row(self, order: Int[Array, " p"]) -> Int[Array, " p"]:
        """The segment of each row."""
        return jnp.zeros_like(self.of_position).at[order].set(self.of_position)


def segments_of(starts: Int[Array, " _"], num_positions: int) -> Segments:
    """Cuts positions at `starts`."""
    begun = jnp.zeros(num_positions + 1, jnp.int32).at[starts[1:]].add(1)
    return Segments(starts, jnp.cumsum(begun[:num_positions]))


def most_first(gains: Int[Array, " p"], segments: Segments) -> Int[Array, " p"]:
    """Positions, segment by segment, of those first that gain most, as exactly as 32 bits allow.

    Segment, gain and place in the segment are one number, since XLA sorts one array many times
    faster than several. The gain has the bits that the others leave, from its sign and exponent on:
    15 where there are 50,000 rows, 7 where there are 10 million. Of equals the first comes first.
    """
    starts, of_position = segments
    position = jnp.arange(of_position.shape[0], dtype=jnp.int32)
    padding = of_position == segments.number
    segment = jnp.where(padding, 0, of_position)
    place = jnp.where(padding, 0, position - starts[segment])
    place_bits, segment_bits = (32 - lax.clz(numbers.max()) for numbers in (place, segment))
    gain_bits = jnp.minimum(32 - place_bits - segment_bits, _ORDERED_BITS)
    gain = _ordered(-gains) >> (_ORDERED_BITS - gain_bits)
    packed = (segment << gain_bits | gain) << place_bits | place
    packed = jnp.where(padding, jnp.uint32(2**32 - 1), packed.astype(jnp.uint32))
    ordered = lax.sort(packed).astype(jnp.int32) & ((1 << place_bits) - 1)
    return jnp.where(padding, position, starts[segment] + ordered)


def swap(
    graph: PairGraph,
    order: Int[Array, " p"],
    segments: Segments,
    partners: Int[Array, " s"],
    *,
    rounds: int,
    eagerness: float,
    key: Key[Array, ""],
    place: Place,
) -> Int[Array, " p"]:
    """Swaps rows between each segment and its partner, round after round.

    Args:
      graph: this device's rows' neighbours.
      order: all rows, by position.
      segments: which positions are one segment.
      partners: of each segment the one to swap with, each other's; itself for none.
      rounds: how many.
      eagerness: the share of swaps worth making that a round makes; less than 1, since neighbours
        that follow each other would miss each other.
      key: of which ones are made.
      place: where this device's rows lie.

    Returns:
      The new order; segments keep their sizes.
    """
    of_position, starts = segments.of_position, segments.starts
    sizes = jnp.append(jnp.diff(starts), 0)
    partners = jnp.append(partners, segments.number)  # padding's is padding
    other = partners[of_position]
    position = jnp.arange(place.num_rows, dtype=jnp.int32)
    rank = position - starts[of_position]
    ranks = jnp.minimum(sizes[of_position], sizes[other])
    paired = (rank < ranks) & (other != of_position)

    def one_round(number: Integer[Array, ""] | int, order: Array) -> Array:
        of_row = segments.of_row(order)
        weights = weights_within(graph, of_row, place)
        gain = _gains(graph, weights, of_row, partners, place)
        # Of each segment the rows that would gain most first; ranks next to each other are mates,
        # another distance in each round, or two that want each other would stay mates for ever.
        order = order[most_first(gain[order], segments)]
        distance = jnp.where(of_position < other, 1, -1) * (number % _DISTANCES)
        mate = starts[other] + (rank + distance) % jnp.maximum(ranks, 1)
        mate = jnp.where(paired, mate, 0)
        first = jnp.minimum(position, mate)
        mate_of_row = jnp.zeros_like(order).at[order].set(jnp.where(paired, order[mate], -1))
        # A row that gains by its mate's neighbourhood does not if that mate leaves.
        tie = _weight_between(graph, weights, mate_of_row, place)[order]
        worth = gain[order] + gain[order[mate]] - 2 * (tie + tie[mate])
        chance = jax.random.uniform(jax.random.fold_in(key, number), (place.num_rows,))
        swapped = paired & (worth > 0) & (chance[first] < eagerness)
        return jnp.where(swapped, order[mate], order)

    return lax.fori_loop(0, rounds, one_round, order)


def refine(
    graph: PairGraph,
    order: Int[Array, " p"],
    segments: Segments,
    *,
    rounds: int,
    eagerness: float,
    key: Key[Array, ""],
    place: Place,
) -> Int[Array, " p"]:
    """Swaps between segments that are no siblings: each round matches those that would gain.

    Arguments and result are those of `swap`; a round is a matching and two rounds of swaps.
    """

    def one_round(number: Integer[Array, ""] | int, order: Array) -> Array:
        match_key, swap_key = jax.random.split(jax.random.fold_in(key, number))
        partners = _matched(graph, segments.of_row(order), segments.number, match_key, place)
        return swap(
            graph,
            order,
            segments,
            partners,
            rounds=2,
            eagerness=eagerness,
            key=swap_key,
            place=place,
        )

    return lax.fori_loop(0, rounds, one_round, order)


def _gains(
    graph: PairGraph,
    weights: Int[Array, "n k"],
    of_row: Int[Array, " p"],
    partners: Int[Array, " s"],
    place: Place,
) -> Int[Array, " p"]:
    """What all rows' losses would gain if a row moved to its segment's partner."""
    theirs, ours = segments_of_neighbours(graph, of_row), place.mine(of_row)[:, None]
    same = theirs == ours
    across = (theirs == partners[ours]) & ~same
    moved = jnp.where(across, weights, 0) - jnp.where(same, weights, 0)
    # By its own neighbours, and by those whose neighbour it is.
    gain = as_varying(jnp.zeros(place.num_rows, jnp.int32), moved)
    gain = gain.at[jnp.where(graph.rows >= 0, graph.rows, place.num_rows)].add(moved, mode="drop")
    mine = place.mine(gain) + moved.sum(1)
    return place.total(lax.dynamic_update_slice_in_dim(gain, mine, place.first, 0))


def _weight_between(
    graph: PairGraph, weights: Int[Array, "n k"], mate: Int[Array, " p"], place: Place
) -> Int[Array, " p"]:
    """The weight of each row's mate among its neighbours."""
    found = (graph.rows == place.mine(mate)[:, None]) & (graph.rows >= 0)
    return place.everyone(jnp.where(found, weights, 0).sum(1))


def _ordered(numbers: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Whole numbers from 0 in the same order, whose highest bits say sign and magnitude."""
    magnitude = lax.bitcast_convert_type(jnp.abs(numbers).astype(jnp.float32), jnp.int32)
    # From the exponent below that of 1 on: at most 2^28.
    magnitude = jnp.maximum(magnitude - (126 << 23), 0)
    return jnp.minimum(2**28 + jnp.sign(numbers) * magnitude, 2**_ORDERED_BITS - 1)


def _matched(
    graph: PairGraph,
    of_row: Int[Array, " p"],
    num_segments: int,
    key: Key[Array, ""],
    place: Place,
) -> Int[Array, " s"]:
    """Pairs of segments that would gain by swaps, drawn at random; the others pair with themselves.

    Each segment proposes where one of its eager rows wants to go; of proposals that meet, the one
    with the highest lot is taken (Luby, "A simple parallel algorithm for the maximal independent
    set problem", STOC 1985).
    """
    weights = weights_within(graph, of_row, place)
    theirs, ours = segments_of_neighbours(graph, of_row), place.mine(of_row)[:, None]
    slots = graph.rows.shape[1]
    rows = place.first + jnp.arange(place.here)
    slot_seed, row_seed, lot_seed = jax.random.bits(key, (3,))
    # Where one of its neighbours is, heavy ones more often.
    lots = weights * _noise(rows[:, None] * slots + jnp.arange(slots), slot_seed)
    elsewhere = (theirs >= 0) & (theirs != ours)
    drawn = jnp.argmax(jnp.where(elsewhere, lots, -1), axis=1, keepdims=True)
    target = jnp.take_along_axis(theirs, drawn, axis=1)
    moved = jnp.where(theirs == target, weights, 0) - jnp.where(theirs == ours, weights, 0)
    wanted = jnp.where(elsewhere.any(1), moved.sum(1), 0)
    eagerness = jnp.ceil(jnp.maximum(wanted, 0) * _noise(rows, row_seed)).astype(jnp.int32)
    eagerness, target = place.everyone(eagerness), place.everyone(target[:, 0])

    most = jax.ops.segment_max(eagerness, of_row, num_segments)
    row = jnp.arange(place.num_rows)
    is_most = eagerness == most[jnp.minimum(of_row, num_segments - 1)]
    proposer = jax.ops.segment_max(jnp.where(is_most, row, -1), of_row, num_segments)
    itself = jnp.arange(num_segments, dtype=jnp.int32)
    proposal = jnp.where(most > 0, target[jnp.maximum(proposer, 0)], itself)
    lot = jnp.argsort(_noise(itself, lot_seed))

    def one_round(_: Integer[Array, ""] | int, partners: Array) -> Array:
        free = partners == itself
        proposes = free & free[proposal] & (proposal != itself)
        lot_here = jnp.where(proposes, lot, -1)
        highest = jnp.maximum(
            lot_here, jnp.full(num_segments, -1, lot.dtype).at[proposal].max(lot_here)
        )
        taken = proposes & (highest == lot_here) & (highest[proposal] == lot_here)
        partners = jnp.where(taken, proposal, partners)
        return partners.at[jnp.where(taken, proposal, num_segments)].set(itself, mode="drop")

    return lax.fori_loop(0, _MATCHING_ROUNDS, one_round, itself)


def _noise(numbers: Integer[Array, "..."], seed: Integer[Array, ""]) -> Float[Array, "..."]:
    """Numbers in [0, 1) that look random, by the number alone, so that no device draws others.

    The mixing of Wellons' "lowbias32", hash-prospector, 2018.
    """
    word = numbers.astype(jnp.uint32) ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    word ^= word >> 16
    return (word >> 8).astype(jnp.float32) / 2**24
