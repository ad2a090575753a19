"""A loss whose positives are all rows of the query's class."""

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
    """Sums over an anchor's candidates, which can be added over several sets of candidates.

    Attributes:
      everything: the log-sum-exp of all candidates' scores.
      positives: the sum of the positives' scores.
      counts: the number of positives.
    """

    everything: Float[Array, " q"]
    positives: Float[Array, " q"]
    counts: Float[Array, " q"]

    def joined(self, other: "_Sums") -> "_Sums":
        """Add the sums over another set of candidates."""
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
    r"""InfoNCE with every row of a query's class as a positive, one value per query.

    With $A_i$ the candidates of anchor $i$, $P_i \subseteq A_i$ the candidates of its class, and
    $s_{ij} = \langle z_i, z_j\rangle / \tau$,

    $$\ell_i = \log \sum_{j \in A_i} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip},$$

    and the value of a row is the mean over its query and its key. With the default directions, all
    keys are candidates of a query, and all queries are candidates of a key. With all four
    directions, all other views in the batch are candidates, and the loss is $L_{out}$ of the paper.
    An anchor without a positive has the value 0.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      labels: classes; rows with the same label are each other's positives. With several labels per
        row, `[q, s]` padded with negative numbers, rows that share any label are.
      key_labels: the keys' labels if they differ from the queries', such as row numbers if `labels`
        lists the row numbers of each query's positives.
      temperature: $\tau > 0$.
      directions: anchors and candidates, as for `infonce_loss`; all directions from one side share
        a softmax.
      masks: only `valid` and `ids`. Within one side, rows with the same id are not each other's
        candidates, and keys in `negatives` with a query's id are masked. Labels replace groups.
      negatives: negatives from outside the batch, by name. Keys whose group equals a query's label
        are masked.
      axis_name, exchange, implementation: as for `LossFn`.

    Returns:
      The loss of each of this device's rows, in nats.

    Raises:
      ValueError: if shapes do not match, or `masks` has groups or margins.

    Relations:
      With a different label for each row, the loss equals `infonce_loss`, or with all directions,
      `nt_xent_loss`.

    Reference:
      Khosla et al., "Supervised Contrastive Learning", 2020, equation 2.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    if any(field is not None for field in masks._replace(ids=None, valid=None)):
        raise ValueError("labels define the positives; masks may only have ids and valid")
    labels = as_labels("labels", labels)
    key_labels = None if key_labels is None else as_labels("key_labels", key_labels)
    within = [direction for direction in directions if direction not in SYMMETRIC]
    if within and jnp.ndim(temperature):
        raise ValueError(f"directions={within} need one temperature for all rows")
    if within and key_labels is not None:
        raise ValueError(f"directions={within} compare rows of one side; set key_labels to None")
    comparison = Comparison(queries, keys, masks, axis_name, exchange, implementation)
    sums = _in_batch(comparison, labels, key_labels, temperature=temperature, directions=directions)
    outside = reduce_outside(
        log_sum_exp(temperature),
        _by_group(comparison, labels, negatives),
        negatives or {},
        directions=directions,
    )
    for values in outside.values():
        for direction, log_sums in values.items():
            both = log_add_exp(sums[direction].everything, log_sums)
            sums[direction] = sums[direction]._replace(everything=both)
    sides = [
        functools.reduce(_Sums.joined, of_side)
        for side in ("query", "key")
        if (of_side := [sums[way] for way in sums if way.startswith(f"{side}_to")])
    ]
    losses = [
        jnp.where(side.counts > 0, side.everything, 0)
        - side.positives / jnp.maximum(side.counts, 1)
        for side in sides
    ]
    loss = jnp.stack(losses).mean(0)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


def _in_batch(
    comparison: Comparison,
    labels: Labels,
    key_labels: Labels | None,
    *,
    temperature: float | Array,
    directions: tuple[str, ...],
) -> dict[str, _Sums]:
    """Each direction's sums over the rows of the batch."""
    sums: dict[str, _Sums] = {}
    queries, keys = comparison.queries, comparison.keys
    everyone = PairLabels(valid=comparison.masks.valid)
    if set(SYMMETRIC) & set(directions):
        positive = everyone._replace(equal=(labels,))
        other = positive if key_labels is None else everyone._replace(equal=(key_labels,))
        both = _sums(comparison, (queries, keys), temperature, (everyone, everyone))
        of_positives = _positives(comparison, (queries, keys), temperature, (positive, other))
        for i, direction in enumerate(SYMMETRIC):
            sums[direction] = _Sums(both[i], *(values[i] for values in of_positives))
    # Within one side, no row is its own candidate.
    others = batch_labels(
        queries.shape[0],
        ids=comparison.masks.ids,
        valid=comparison.masks.valid,
        axis_name=comparison.axis_name,
    )
    for direction, side in (("query_to_query", queries), ("key_to_key", keys)):
        if direction in directions:
            positive = others._replace(equal=(labels,))
            everything, _ = _sums(comparison, (side, side), temperature, (others, others))
            of_positives = _positives(comparison, (side, side), temperature, (positive, positive))
            sums[direction] = _Sums(everything, *(values[0] for values in of_positives))
    return {direction: sums[direction] for direction in directions}


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
        **comparison.reduction_options(),
    )


def _positives(
    comparison: Comparison,
    sides: tuple[Array, Array],
    temperature: float | Array,
    labels: tuple[PairLabels, PairLabels],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The sum of the positives' scores and the number of positives, per row and per column."""
    both = {"query_labels": labels[0], "key_labels": labels[1], **comparison.reduction_options()}
    return pair_sum(*sides, temperature=temperature, **both), pair_count(*sides, **both)


def _by_group(
    comparison: Comparison, labels: Labels, negatives: NegativesByName | None
) -> Comparison:
    """The comparison for negatives from outside the batch, with the labels as groups."""
    grouped = [name for name, tier in (negatives or {}).items() if tier.groups is not None]
    if not grouped:
        return comparison
    if labels.ndim > 1:
        raise ValueError(
            f"negatives {', '.join(grouped)} have groups, which need exactly one label per row to "
            "compare with; set their groups to None"
        )
    return comparison._replace(masks=comparison.masks._replace(groups=labels))
