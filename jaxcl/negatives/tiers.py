"""Budgets of negatives per tier, and draws from a bank that fill them."""

import math
import operator
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.negatives.draws import draw_slots
from jaxcl.negatives.masks import similarity_ceilings
from jaxcl.negatives.memory_bank import MemoryBank, read_bank
from jaxcl.negatives.sets import OwnNegatives, SharedNegatives
from jaxcl.negatives.synthetic import mixed, mixed_with_query, perturbed
from jaxcl.ops.arguments import as_labels, as_vectors, host_labels
from jaxcl.ops.nearest import nearest
from jaxcl.ops.pairs import PairLabels
from jaxcl.ops.row_tables import fetch_rows
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Int, Integer, Key, Range, check_ranges

__all__ = [
    "DrawSource",
    "Strata",
    "TierBudgets",
    "draw_tiers",
    "strata_of",
]


class TierBudgets(NamedTuple):
    """The number of negatives in each tier.

    The tiers `uniform`, `stratified` and `nearest` draw disjoint slots, in this order.

    Attributes:
      full_bank: whether the full bank provides negatives for every query.
      uniform: random slots of the bank, redrawn in each step, shared by all queries.
      stratified: random slots as in `uniform`, but with a quota per group from `Strata`.
      nearest: each query's nearest slots of the bank that its masks allow.
      mixed: mixtures of two of a query's hardest negatives.
      mixed_with_query: mixtures of the query and one of its hardest negatives.
      perturbed: hardest negatives rotated by `degrees`.
      hardest: number of nearest negatives from which the three synthetic tiers are built, in the
        bank, or in the batch if there is no bank.
      of_batch: whether to build synthetic negatives from the batch even if there is a bank, such as
        one for mining or batch assignment.
      degrees: rotation angle of perturbed negatives.
      gradient: whether gradients flow through synthetic negatives to their sources.
    """

    full_bank: bool = False
    uniform: Annotated[int, Range(least=0)] = 0
    stratified: Annotated[int, Range(least=0)] = 0
    nearest: Annotated[int, Range(least=0)] = 0
    mixed: Annotated[int, Range(least=0)] = 0
    mixed_with_query: Annotated[int, Range(least=0)] = 0
    perturbed: Annotated[int, Range(least=0)] = 0
    hardest: Annotated[int, Range(least=1)] = 64
    of_batch: bool = False
    degrees: Annotated[float, Range(above=0, most=180)] = 20.0
    gradient: bool = False

    @property
    def drawn(self) -> int:
        """The number of slots drawn from the bank, without `full_bank`."""
        return self.uniform + self.stratified + self.nearest

    @property
    def synthetic(self) -> int:
        """The number of synthetic negatives per query."""
        return self.mixed + self.mixed_with_query + self.perturbed

    @property
    def any_tier(self) -> bool:
        """Whether any tier has a budget."""
        return self.full_bank or self.drawn + self.synthetic > 0


class Strata(NamedTuple):
    """The number of slots that a stratified draw takes from each group.

    Attributes:
      groups: the groups with a quota, ascending.
      quotas: slots to draw from each group; all of its slots if a group has fewer.
    """

    groups: Int[Array, " g"]
    quotas: Int[Array, " g"]


class DrawSource(NamedTuple):
    """A bank and the random numbers of its draws.

    Attributes:
      bank: this device's share of the bank.
      uniform: this device's share of the uniform draw's `priorities`; `None` without this tier.
      stratified: this device's share of the stratified draw's `priorities`.
      strata: the quotas of the stratified draw.
    """

    bank: MemoryBank
    uniform: Integer[Array, " m"] | None = None
    stratified: Integer[Array, " m"] | None = None
    strata: Strata | None = None


def strata_of(
    groups: Integer[np.ndarray, " n"],
    *,
    count: int,
    proportions: str | Mapping[int | str, int | float] = "rows",
) -> Strata:
    """Divide a budget among groups by largest remainders, so that the quotas add up to it.

    Args:
      groups: each training row's group.
      count: number of slots to divide.
      proportions: `"rows"` for quotas in proportion to training rows, `"equal"` for the same quota
        for each group, or group -> weight, where missing groups get none.

    Raises:
      ValueError: if a name is unknown, a group has no rows or does not fit in int32, or the weights
        are invalid.
      TypeError: if groups are not integers.

    Example:
      >>> strata_of(np.array([3, 3, 3, 8]), count=5).quotas.tolist()
      [4, 1]
    """
    labels, sizes = np.unique(host_labels("groups", groups), return_counts=True)
    if proportions == "rows":
        weights = sizes.astype(np.float64)
    elif proportions == "equal":
        weights = np.ones(len(labels))
    elif isinstance(proportions, str):
        raise ValueError(
            f"proportions={proportions!r} is unknown; use rows, equal, or weights by group"
        )
    else:
        by_group = {_group(group): float(weight) for group, weight in proportions.items()}
        unknown = sorted(set(by_group) - set(labels.tolist()))
        if unknown:
            raise ValueError(f"proportions name groups {unknown}, which have no rows")
        weights = np.array([by_group.get(int(label), 0.0) for label in labels])
        if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"proportions={by_group} must be at least 0, and not all 0")
    exact = count * weights / weights.sum()
    quotas = np.floor(exact).astype(np.int64)
    missing = count - quotas.sum()
    # Stable, so that on every host, ties between remainders go to the lowest group.
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    drawn = quotas > 0  # other groups would only lengthen the counts that devices exchange
    return Strata(jnp.asarray(labels[drawn], jnp.int32), jnp.asarray(quotas[drawn], jnp.int32))


def _group(name: int | str) -> int:
    return int(name) if isinstance(name, str) else operator.index(name)  # `int` would truncate


def draw_tiers(
    budgets: TierBudgets,
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    row_keys: Key[Array, " q"],
    ids: Integer[Array, " q"],
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None = None,
    source: DrawSource | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, SharedNegatives | OwnNegatives]:
    """Draw the negatives of a step from outside its batch, by tier, as `negatives` of a loss.

    A device never holds more of the bank than its share and its draws. With `p` devices and `q`
    queries on each, every device sends and receives `s` entries for a shared budget of `s` slots,
    `p · q · o` entries for a budget of `o` per query, and `p · q` queries for the search of nearest
    slots.

    Args:
      budgets: the number of negatives in each tier.
      queries: this device's queries.
      keys: this device's keys.
      row_keys: a random key for each of this device's rows.
      ids: the rows' ids, as in `Masks`.
      groups: the rows' groups, as in `Masks`.
      valid: `False` for padding.
      margin: as in `Masks`; it also masks the nearest negatives.
      relative_margin: the margin as a fraction of the positive's similarity.
      guides: the guide model's embeddings, as in `Masks`.
      source: the bank to draw from; without it, or with `budgets.of_batch`, the three synthetic
        tiers are built from the batch.
      axis_name: the mesh axes over which rows and slots are sharded.

    Returns:
      The negatives of each tier with a budget.

    Raises:
      ValueError: if a budget or margin is out of range, both margins are given, or a label does not
        fit in int32.
      TypeError: if labels are not integers.
    """
    check_ranges(budgets)
    queries, keys = as_vectors("queries", queries), as_vectors("keys", keys)
    ids = as_labels("ids", ids)
    groups = None if groups is None else as_labels("groups", groups)
    ceilings = similarity_ceilings(
        inner_product(*((queries, keys) if guides is None else guides)),
        margin=margin,
        relative_margin=relative_margin,
    )
    query_guide, key_guide = (None, None) if guides is None else guides
    batch = SharedNegatives(keys, ids, groups, valid, key_guide)
    tiers: dict[str, SharedNegatives | OwnNegatives] = {}
    slots = batch
    if source is not None:
        drawn, slots = _drawn_by_all(budgets, source, axis_name)
        tiers |= drawn

    def hardest_of(candidates: SharedNegatives, count: int) -> OwnNegatives:
        labels = PairLabels(
            different=(ids,) if groups is None else (ids, groups),
            valid=valid,
            ceiling=ceilings,
            guide=query_guide,
        )
        gradient = budgets.gradient
        return _nearest_of(queries, labels, candidates, count, axis_name, gradient=gradient)

    from_batch = budgets.of_batch and source is not None
    hardest_count = budgets.hardest if budgets.synthetic else 0
    # The search is the most expensive part, so all tiers with the same candidates share one.
    count = budgets.nearest if from_batch else max(budgets.nearest, hardest_count)
    if count:
        hardest = hardest_of(slots, count)
    if budgets.nearest:
        tiers["nearest"] = jax.tree.map(lambda leaf: leaf[:, : budgets.nearest], hardest)
    if hardest_count:
        if from_batch:
            hardest = hardest_of(batch, hardest_count)
        tiers |= _synthetic(budgets, queries, hardest, row_keys, guided=guides is not None)
    return tiers


def _drawn_by_all(
    budgets: TierBudgets, source: DrawSource, axis_name: AxisName | None
) -> tuple[dict[str, SharedNegatives], SharedNegatives]:
    """Draw the tiers that all queries share, and return the slots left for the other tiers."""
    slots = read_bank(source.bank)
    free = source.bank.written >= 0
    tiers = {"bank": slots} if budgets.full_bank else {}

    def draw(name: str, stratum: Array, quotas: Array, count: int) -> Array:
        priority = getattr(source, name)
        drawn = draw_slots(priority, stratum, quotas, count=count, axis_name=axis_name)
        tiers[name] = _share_of(drawn, slots, axis_name)
        return free & ~_here(drawn, free.shape[0], axis_name)

    if budgets.uniform:
        free = draw("uniform", jnp.where(free, 0, 1), jnp.array([budgets.uniform]), budgets.uniform)
    if budgets.stratified:
        assert source.strata is not None
        groups, quotas = source.strata
        # `searchsorted` returns an index for any group, including groups without a quota.
        indices = jnp.searchsorted(groups, source.bank.groups).astype(jnp.int32)
        known = groups.at[indices].get(mode="fill", fill_value=-1) == source.bank.groups
        stratum = jnp.where(free & known, indices, groups.shape[0])
        free = draw("stratified", stratum, quotas, budgets.stratified)
    return tiers, slots._replace(valid=free)


def _share_of(drawn: Array, slots: SharedNegatives, axis_name: AxisName | None) -> SharedNegatives:
    """Fetch the drawn slots as negatives, divided over the devices."""
    # Every device knows all slot numbers, but fetches only the entries of its share.
    if axis_name is not None:
        size = lax.axis_size(axis_name)
        share = math.ceil(drawn.shape[0] / size)
        padded = jnp.pad(drawn, (0, share * size - drawn.shape[0]), constant_values=-1)
        drawn = lax.dynamic_slice_in_dim(padded, lax.axis_index(axis_name) * share, share)
    entries = fetch_rows(slots._replace(valid=None), drawn, axis_name=axis_name, constant=True)
    return entries._replace(valid=drawn >= 0)


def _here(drawn: Array, num_slots: int, axis_name: AxisName | None) -> Array:
    """Whether each of this device's slots has been drawn."""
    first = 0 if axis_name is None else lax.axis_index(axis_name) * num_slots
    # Slots of previous devices, and −1, would otherwise index from the end of this device's share.
    indices = jnp.where(drawn >= first, drawn - first, num_slots)
    return jnp.zeros(num_slots, bool).at[indices].set(True, mode="drop")


def _nearest_of(
    queries: Float[Array, "q d"],
    labels: PairLabels,
    slots: SharedNegatives,
    count: int,
    axis_name: AxisName | None,
    *,
    gradient: bool,
) -> OwnNegatives:
    different = tuple(label for label in (slots.ids, slots.groups) if label is not None)
    different = different[: len(labels.different)]
    slot_labels = PairLabels(different=different, valid=slots.valid, guide=slots.guides)
    vectors = slots.vectors.astype(queries.dtype)
    rows = nearest(
        queries,
        vectors,
        count=count,
        query_labels=labels,
        table_labels=slot_labels,
        axis_name=axis_name,
    ).rows
    entries = fetch_rows(
        slots._replace(valid=None), rows, axis_name=axis_name, constant=not gradient
    )
    return OwnNegatives(entries.vectors, entries.ids, entries.groups, rows >= 0, entries.guides)


def _synthetic(
    budgets: TierBudgets,
    queries: Float[Array, "q d"],
    hardest: OwnNegatives,
    row_keys: Key[Array, " q"],
    *,
    guided: bool,
) -> dict[str, OwnNegatives]:
    assert hardest.valid is not None
    vectors, valid = hardest.vectors[:, : budgets.hardest], hardest.valid[:, : budgets.hardest]
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    vectors, queries = vectors.astype(wide), queries.astype(wide)

    # One key per tier and row, so that a tier's draws do not depend on the other tiers.
    def keys(number: int) -> Array:
        return jax.vmap(jax.random.fold_in, (0, None))(row_keys, number)

    synthetic = {}
    if budgets.mixed:
        synthetic["mixed"] = mixed(keys(0), vectors, valid, count=budgets.mixed)
    if budgets.mixed_with_query:
        synthetic["mixed_with_query"] = mixed_with_query(
            keys(1), queries, vectors, valid, count=budgets.mixed_with_query
        )
    if budgets.perturbed:
        synthetic["perturbed"] = perturbed(
            keys(2), vectors, valid, count=budgets.perturbed, degrees=budgets.degrees
        )
    if not budgets.gradient:
        synthetic = lax.stop_gradient(synthetic)
    # The guide model has not encoded synthetic negatives. Their vectors serve as its embeddings,
    # which suits guides that share this model's space, such as its moving average.
    return {
        name: OwnNegatives(
            vectors, valid=valid, guides=lax.stop_gradient(vectors) if guided else None
        )
        for name, (vectors, valid) in synthetic.items()
    }
