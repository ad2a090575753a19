"""A loss with many positives per query: all rows of its class."""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from jaxcl.losses.comparison import SYMMETRIC, Comparison, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks, NegativesByName
from jaxcl.losses.reduce_negatives import log_sum_exp, reduce_outside
from jaxcl.negatives.masks import batch_labels
from jaxcl.ops.arguments import as_labels
from jaxcl.ops.pairs import Labels, PairLabels, pair_count, pair_logsumexp, pair_sum
from jaxcl.ops.pairs.reductions import log_add_exp
from jaxcl.typing import Array, AxisName, Float

__all__ = ["supervised_infonce_loss"]


class _Sums(NamedTuple):
    """Sums over an anchor's candidates, which add up over several sets of candidates.

    Attributes:
      everything: the log-sum-exp of the scores of all candidates.
      positives: the sum of the positives' scores.
      counts: the number of positives.
    """

    everything: Float[Array, " q"]
    positives: Float[Array, " q"]
    counts: Float[Array, " q"]

    def joined(self, other: "_Sums") -> "_Sums":
        """The sums over both sets of candidates."""
        return _Sums(
            log_add_exp(self.everything, other.everything),
            self.positives + other.positives,
            self.counts + other.counts,
        )


def supervised_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    labels: Labels,
    key_labels: Labels | None = None,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    directions: tuple[str, ...] = SYMMETRIC,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE in which every row of a query's class is a positive, one value per query.

    With $A_i$ the candidates of anchor $i$, $P_i \subseteq A_i$ the candidates of its class, and
    $s_{ij} = \langle z_i, z_j\rangle / \tau$,

    $$\ell_i = \log \sum_{j \in A_i} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip},$$

    and the value of a row is the mean over its query and its key. With the default directions a
    query's candidates are all keys, and a key's are all queries. With all four, they are all
    other views of the batch, and the loss is $L_{out}$ of the paper. An anchor without a positive
    has the value 0.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      labels: classes; rows with the same label are positives of each other. With several labels
        per row, `[q, s]` padded with negative numbers, rows that share one are.
      key_labels: the labels of the keys if they differ from the queries', such as row
        numbers if `labels` are the numbers of each query's positives.
      temperature: $\tau > 0$.
      directions: anchors and candidates, as for `infonce_loss`; all directions from one side share
        a softmax.
      masks: `valid`, and `ids`: two rows with the same id are never candidates of each other within
        one side, and no query meets its own key among `negatives`. Labels take the place of groups.
      negatives: negatives from outside the batch, by name. Those whose groups equal a query's label
        do not count for it.
      axis_name, exchange, implementation: as for `LossFn`.

    Returns:
      The loss of each of this device's rows, in nats.

    Raises:
      ValueError: for sides or negatives that do not fit, and for groups or margins in `masks`.

    Relations:
      With a different label for each row it is `infonce_loss`, and with all directions
      `nt_xent_loss`.

    Reference:
      Khosla et al., "Supervised Contrastive Learning", 2020, equation 2.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    if any(field is not None for field in masks._replace(ids=None, valid=None)):
        raise ValueError("labels decide which rows are positives; masks takes only ids and valid")
    labels = as_labels("labels", labels)
    key_labels = None if key_labels is None else as_labels("key_labels", key_labels)
    within = [one for one in directions if one not in SYMMETRIC]
    if within and jnp.ndim(temperature):
        raise ValueError(f"directions={within} take one temperature for all rows")
    if within and key_labels is not None:
        raise ValueError(f"directions={within} compare rows of one side; leave key_labels None")
    comparison = Comparison(masks, axis_name, exchange, implementation)
    found = _in_batch(
        comparison, queries, keys, labels, key_labels, temperature=temperature, wanted=directions
    )
    outside = reduce_outside(
        log_sum_exp(temperature),
        _by_group(comparison, labels, negatives),
        queries,
        keys,
        negatives or {},
        directions=directions,
    )
    for values in outside.values():
        for direction, more in values.items():
            both = log_add_exp(found[direction].everything, more)
            found[direction] = found[direction]._replace(everything=both)
    sides = [
        functools.reduce(_Sums.joined, of_side)
        for side in ("query", "key")
        if (of_side := [found[one] for one in found if one.startswith(f"{side}_to")])
    ]
    losses = [
        jnp.where(one.counts > 0, one.everything, 0) - one.positives / jnp.maximum(one.counts, 1)
        for one in sides
    ]
    loss = jnp.stack(losses).mean(0)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


def _in_batch(
    comparison: Comparison,
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    labels: Labels,
    key_labels: Labels | None,
    *,
    temperature: float | Array,
    wanted: tuple[str, ...],
) -> dict[str, _Sums]:
    """Each direction's sums over the rows of the batch."""
    found: dict[str, _Sums] = {}
    everyone = PairLabels(valid=comparison.masks.valid)
    if set(SYMMETRIC) & set(wanted):
        positive = everyone._replace(equal=(labels,))
        other = positive if key_labels is None else everyone._replace(equal=(key_labels,))
        both = _sums(comparison, (queries, keys), temperature, (everyone, everyone))
        counted = _positives(comparison, (queries, keys), temperature, (positive, other))
        for place, direction in enumerate(SYMMETRIC):
            found[direction] = _Sums(both[place], *(one[place] for one in counted))
    # Within one side, no row is its own candidate.
    others = batch_labels(
        queries.shape[0],
        ids=comparison.masks.ids,
        valid=comparison.masks.valid,
        axis_name=comparison.axis_name,
    )
    for direction, side in (("query_to_query", queries), ("key_to_key", keys)):
        if direction in wanted:
            positive = others._replace(equal=(labels,))
            everything, _ = _sums(comparison, (side, side), temperature, (others, others))
            counted = _positives(comparison, (side, side), temperature, (positive, positive))
            found[direction] = _Sums(everything, *(one[0] for one in counted))
    return {direction: found[direction] for direction in wanted}


def _sums(
    comparison: Comparison,
    sides: tuple[Array, Array],
    temperature: float | Array,
    labels: tuple[PairLabels, PairLabels],
) -> tuple[Array, Array]:
    return pair_logsumexp(
        *sides,
        temperature=temperature,
        query_labels=labels[0],
        key_labels=labels[1],
        **comparison.how(),
    )


def _positives(
    comparison: Comparison,
    sides: tuple[Array, Array],
    temperature: float | Array,
    labels: tuple[PairLabels, PairLabels],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The sums of the positives' scores, and their numbers, each by row and by column."""
    both = {"query_labels": labels[0], "key_labels": labels[1], **comparison.how()}
    return pair_sum(*sides, temperature=temperature, **both), pair_count(*sides, **both)


def _by_group(
    comparison: Comparison, labels: Labels, negatives: NegativesByName | None
) -> Comparison:
    """The comparison with negatives from outside, in which labels are groups."""
    have_groups = [name for name, one in (negatives or {}).items() if one.groups is not None]
    if not have_groups:
        return comparison
    if labels.ndim > 1:
        raise ValueError(
            f"the groups of the negatives {', '.join(have_groups)} are compared with labels, of "
            "which each row must have one; leave the groups None"
        )
    return comparison._replace(masks=comparison.masks._replace(groups=labels))
