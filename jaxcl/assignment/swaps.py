"""Swap rows between segments to bring more of the loss's mass into the batches.

A parallel form of Kernighan and Lin, "An efficient heuristic procedure for partitioning graphs",
Bell System Technical Journal, 1970. The rows of two segments are ranked by their gain from moving
to the other segment, rows of equal rank are paired, and all profitable pairs swap at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.assignment.graph import Edges, PairGraph, segments_of_neighbours, weights_within
from jaxcl.assignment.place import Place
from jaxcl.ops.varying import as_varying
from jaxcl.typing import Array, Float, Int, Integer, Key

__all__ = ["Segments", "most_first", "refine", "segments_of", "swap"]

_MATCHING_ROUNDS = 4
_DISTANCES = 3
_ORDERED_BITS = 29  # the width of the numbers that `_ordered` returns


class Segments(NamedTuple):
    """A partition of all positions of an order, equal on all devices.

    Attributes:
      starts: the first position of each segment, followed by the first position of the padding.
      of_position: the segment of each position; `number` for padding.
    """

    starts: Int[Array, " _"]
    of_position: Int[Array, " p"]

    @property
    def number(self) -> int:
        """The number of segments, including empty ones."""
        return self.starts.shape[0] - 1

    def of_row(self, order: Int[Array, " p"]) -> Int[Array, " p"]:
        """The segment of each row."""
        return jnp.zeros_like(self.of_position).at[order].set(self.of_position)


def segments_of(starts: Int[Array, " _"], num_positions: int) -> Segments:
    """Cut positions at `starts`."""
    # One extra entry, since segments without padding end at `num_positions`.
    begun = jnp.zeros(num_positions + 1, jnp.int32).at[starts[1:]].add(1)
    return Segments(starts, jnp.cumsum(begun[:num_positions]))


def most_first(gains: Int[Array, " p"], segments: Segments) -> Int[Array, " p"]:
    """Sort positions by segment and descending gain, as precisely as 32 bits allow.

    Segment, gain and offset in the segment are packed into one integer, since XLA sorts one array
    many times faster than several. The gain gets the remaining bits, sign and exponent first: 15
    for 50,000 rows, 7 for 10 million. Equal gains keep their order.
    """
    starts, of_position = segments
    position = jnp.arange(of_position.shape[0], dtype=jnp.int32)
    padding = of_position == segments.number
    segment = jnp.where(padding, 0, of_position)
    offset = jnp.where(padding, 0, position - starts[segment])
    offset_bits, segment_bits = (32 - lax.clz(numbers.max()) for numbers in (offset, segment))
    gain_bits = jnp.minimum(32 - offset_bits - segment_bits, _ORDERED_BITS)
    gain = _ordered(-gains) >> (_ORDERED_BITS - gain_bits)
    # All 32 bits may be in use; as int32, segments with the top bit set would sort first.
    packed = (segment << gain_bits | gain) << offset_bits | offset
    packed = jnp.where(padding, jnp.uint32(2**32 - 1), packed.astype(jnp.uint32))
    # Sorting leaves each segment in its own positions, so only the offset is unpacked.
    ordered = lax.sort(packed).astype(jnp.int32) & ((1 << offset_bits) - 1)
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
    """Swap rows between each segment and its partner, round after round.

    Args:
      graph: the neighbours of this device's rows.
      order: all rows, by position.
      segments: the partition of the positions.
      partners: each segment's partner, in mutual pairs; a segment without one has itself.
      rounds: number of rounds.
      eagerness: the fraction of profitable swaps that each round makes. It is below 1, so that two
        neighbours do not both cross in the same round and stay separated.
      key: draws the swaps that are made.
      place: this device's range of rows.

    Returns:
      The new order; segments keep their sizes.
    """
    of_position, starts = segments.of_position, segments.starts
    # Padding is an extra empty segment that is its own partner, so it never swaps.
    sizes = jnp.append(jnp.diff(starts), 0)
    partners = jnp.append(partners, segments.number)
    other = partners[of_position]
    position = jnp.arange(place.num_rows, dtype=jnp.int32)
    rank = position - starts[of_position]
    ranks = jnp.minimum(sizes[of_position], sizes[other])
    paired = (rank < ranks) & (other != of_position)

    def one_round(number: Integer[Array, ""] | int, order: Array) -> Array:
        of_row = segments.of_row(order)
        edges = Edges(graph.rows, weights_within(graph, of_row, place))
        gain = _gains(edges, of_row, partners, place)
        order = order[most_first(gain[order], segments)]
        # Rows of nearby ranks are paired, at a different distance in each round: two neighbours
        # that block each other's swap would otherwise stay paired forever. The two sides have
        # opposite signs, so that pairing is mutual.
        distance = jnp.where(of_position < other, 1, -1) * (number % _DISTANCES)
        counterpart = starts[other] + (rank + distance) % jnp.maximum(ranks, 1)
        counterpart = jnp.where(paired, counterpart, 0)
        first = jnp.minimum(position, counterpart)
        paired_row = jnp.zeros_like(order).at[order].set(jnp.where(paired, order[counterpart], -1))
        # Kernighan and Lin's correction: an edge between the two rows still crosses after the swap,
        # but both gains include it.
        tie = _weight_between(edges, paired_row, place)[order]
        worth = gain[order] + gain[order[counterpart]] - 2 * (tie + tie[counterpart])
        # Both rows use the random number of the lower position. If only one of them moved, the
        # order would contain one row twice and lose another.
        chance = jax.random.uniform(jax.random.fold_in(key, number), (place.num_rows,))
        swapped = paired & (worth > 0) & (chance[first] < eagerness)
        return jnp.where(swapped, order[counterpart], order)

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
    """Swap rows between segments that need not be siblings: each round draws new partners.

    Arguments and result as for `swap`; a round is one matching and two rounds of swaps.
    """

    def one_round(number: Integer[Array, ""] | int, order: Array) -> Array:
        match_key, swap_key = jax.random.split(jax.random.fold_in(key, number))
        partners = _matched(graph, segments.of_row(order), segments, match_key, place)
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
    edges: Edges, of_row: Int[Array, " p"], partners: Int[Array, " s"], place: Place
) -> Int[Array, " p"]:
    """The gain over all rows from moving a row to its segment's partner."""
    rows, weights = edges
    neighbour_segments, row_segments = (
        segments_of_neighbours(edges, of_row),
        place.mine(of_row)[:, None],
    )
    same = neighbour_segments == row_segments
    across = (neighbour_segments == partners[row_segments]) & ~same
    moved = jnp.where(across, weights, 0) - jnp.where(same, weights, 0)
    # Edges count at both ends, since a row may be a neighbour of rows on any device. Integer sums
    # depend neither on the order of the scatter nor on the number of devices.
    gain = as_varying(jnp.zeros(place.num_rows, jnp.int32), moved)
    gain = gain.at[jnp.where(rows >= 0, rows, place.num_rows)].add(moved, mode="drop")
    mine = place.mine(gain) + moved.sum(1)
    return place.total(lax.dynamic_update_slice_in_dim(gain, mine, place.first, 0))


def _weight_between(edges: Edges, paired_row: Int[Array, " p"], place: Place) -> Int[Array, " p"]:
    """The weight of the edge from each row to the row it is paired with; 0 without an edge."""
    is_pair = (edges.rows == place.mine(paired_row)[:, None]) & (edges.rows >= 0)
    return place.everyone(jnp.where(is_pair, edges.weights, 0).sum(1))


def _ordered(numbers: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Map to non-negative integers in the same order, with sign and magnitude in the top bits."""
    # The bits of positive floats sort like the floats, the exponent first: a prefix of the bits
    # resolves small gains as well as large gains.
    magnitude = lax.bitcast_convert_type(jnp.abs(numbers).astype(jnp.float32), jnp.int32)
    # Counted from one exponent below that of 1, so that 2^31 becomes 2^28 and 1 stays above 0.
    magnitude = jnp.maximum(magnitude - (126 << 23), 0)
    return jnp.minimum(2**28 + jnp.sign(numbers) * magnitude, 2**_ORDERED_BITS - 1)


def _matched(
    graph: PairGraph,
    of_row: Int[Array, " p"],
    segments: Segments,
    key: Key[Array, ""],
    place: Place,
) -> Int[Array, " s"]:
    """Draw pairs of segments that would gain from swaps; other segments pair with themselves.

    Each segment proposes the destination of one of its rows with a large gain. Among proposals that
    share a segment, the one with the highest lot is accepted (Luby, "A simple parallel algorithm
    for the maximal independent set problem", STOC 1985).
    """
    weights = weights_within(graph, of_row, place)
    neighbour_segments, row_segments = (
        segments_of_neighbours(graph, of_row),
        place.mine(of_row)[:, None],
    )
    # A row has at most as many neighbours as there are rows, however wide the graph is.
    slots = jnp.minimum(graph.rows.shape[1], segments.starts[-1])
    num_segments = segments.number
    rows = place.first + jnp.arange(place.here)
    slot_seed, row_seed, lot_seed = jax.random.bits(key, (3,))
    # A row's destination is the segment of a random neighbour, weighted by the edge. The noise
    # depends on the global row number, so devices agree without communication.
    lots = weights * _noise(rows[:, None] * slots + jnp.arange(graph.rows.shape[1]), slot_seed)
    elsewhere = (neighbour_segments >= 0) & (neighbour_segments != row_segments)
    drawn = jnp.argmax(jnp.where(elsewhere, lots, -1), axis=1, keepdims=True)
    target = jnp.take_along_axis(neighbour_segments, drawn, axis=1)
    moved = jnp.where(neighbour_segments == target, weights, 0) - jnp.where(
        neighbour_segments == row_segments, weights, 0
    )
    gain = jnp.where(elsewhere.any(1), moved.sum(1), 0)
    eagerness = jnp.ceil(jnp.maximum(gain, 0) * _noise(rows, row_seed)).astype(jnp.int32)
    eagerness, target = place.everyone(eagerness), place.everyone(target[:, 0])

    # Padding is out of range here, and `segment_max` drops it.
    most = jax.ops.segment_max(eagerness, of_row, num_segments)
    row = jnp.arange(place.num_rows)
    is_most = eagerness == most[jnp.minimum(of_row, num_segments - 1)]
    proposer = jax.ops.segment_max(jnp.where(is_most, row, -1), of_row, num_segments)
    itself = jnp.arange(num_segments, dtype=jnp.int32)
    proposal = jnp.where(most > 0, target[jnp.maximum(proposer, 0)], itself)
    # Lots are a permutation, hence distinct: only one of the proposals that share a segment can
    # have the highest lot.
    lot = jnp.argsort(_noise(itself, lot_seed))

    def one_round(_: Integer[Array, ""] | int, partners: Array) -> Array:
        free = partners == itself
        proposes = free & free[proposal] & (proposal != itself)
        own_lot = jnp.where(proposes, lot, -1)
        highest = jnp.maximum(
            own_lot, jnp.full(num_segments, -1, lot.dtype).at[proposal].max(own_lot)
        )
        accepted = proposes & (highest == own_lot) & (highest[proposal] == own_lot)
        partners = jnp.where(accepted, proposal, partners)
        return partners.at[jnp.where(accepted, proposal, num_segments)].set(itself, mode="drop")

    return lax.fori_loop(0, _MATCHING_ROUNDS, one_round, itself)


def _noise(numbers: Integer[Array, "..."], seed: Integer[Array, ""]) -> Float[Array, "..."]:
    """Pseudo-random values in [0, 1), each a function of only its number and the seed.

    They therefore do not depend on the number of devices. The hash is Wellons' "lowbias32",
    hash-prospector, 2018.
    """
    word = numbers.astype(jnp.uint32) ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    word ^= word >> 16
    # 24 bits fit in a float32; with all 32, rounding could return 1.
    return (word >> 8).astype(jnp.float32) / 2**24
