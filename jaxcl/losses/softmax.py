"""InfoNCE and its variants: the cross entropy of finding a query's key among all keys."""

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.losses.comparison import DIRECTIONS, SYMMETRIC, Comparison, checked_batch
from jaxcl.losses.protocol import NO_MASKS, Masks, NegativesByName
from jaxcl.losses.reduce_negatives import COUNT, log_sum_exp, reduce_all
from jaxcl.negatives.sets import SharedNegatives
from jaxcl.ops.arguments import check_numbers
from jaxcl.ops.pairs.reductions import log_add_exp
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Float, Range

__all__ = [
    "PARTITIONS",
    "DirectionOptions",
    "HardOptions",
    "InfonceOptions",
    "decoupled_infonce_loss",
    "hard_infonce_loss",
    "infonce_loss",
    "nt_xent_loss",
]

PARTITIONS = ("separate", "anchor", "joint")


class InfonceOptions(NamedTuple):
    """Options of `infonce_loss` in a config."""

    directions: tuple[str, ...] | None = None
    partition: str | None = None
    hardness: Annotated[float, Range(least=0)] | None = None
    negative_hardness: Annotated[float, Range(least=0)] | None = None


class DirectionOptions(NamedTuple):
    """Options of a loss that only chooses its directions."""

    directions: tuple[str, ...] | None = None


class HardOptions(NamedTuple):
    """Options of `hard_infonce_loss` in a config."""

    concentration: Annotated[float, Range(least=0)] | None = None
    positive_share: Annotated[float, Range(least=0, below=1)] | None = None
    directions: tuple[str, ...] | None = None


def infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.05,
    directions: tuple[str, ...] = SYMMETRIC,
    partition: str = "separate",
    hardness: float = 0.0,
    negative_hardness: float = 0.0,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE with in-batch negatives from every device, one value per query.

    With $s_{ij} = \langle q_i, k_j\rangle / \tau$ and the mask $m_{ij}$ of allowed pairs,

    $$\ell_i^{q \to k} = \log\big(e^{s_{ii}} + \sum_{j \ne i} m_{ij} e^{s_{ij}}\big) - s_{ii},
    \qquad
    \ell_i^{k \to q} = \log\big(e^{s_{ii}} + \sum_{j \ne i} m_{ji} e^{s_{ji}}\big) - s_{ii},$$

    and in `"query_to_query"` and `"key_to_key"` the negatives are the other rows of the same side.
    The value is the mean over the directions, except as described under `partition`. The first two
    directions share one matrix product, and only one of its tiles is stored at a time.

    Args:
      queries: this device's queries, usually unit vectors; the positive of query `i` is key `i`.
      keys: this device's keys. Their gradient includes the queries of all devices.
      temperature: $\tau > 0$, one for all or one per row; may be learned. 0.05 suits unit vectors.
      directions: anchors and candidates; one or more of `"query_to_key"`, `"key_to_query"`,
        `"query_to_query"` and `"key_to_key"`.
      partition: which negatives share a softmax. `"separate"`: the negatives of one direction,
        and the loss is the mean over the directions. `"anchor"`: the negatives of all directions
        from one side, and the loss is the mean over the two sides. `"joint"`: all negatives, and
        the positive occurs once for each of the first two directions.
      hardness: $\alpha \ge 0$; multiplies the weight of each negative from another row by
        $e^{\alpha \langle q_i, k_j\rangle}$, held constant in the gradient.
      negative_hardness: $\alpha$ for explicit and separate negatives of the query itself.
      masks: pairs that are not negatives.
      negatives: negatives from outside the batch by name: explicit negatives, and the tiers of
        `jaxcl.negatives.draw_tiers`. They are keys, so they are negatives of queries in
        `"query_to_key"`; explicit ones are also negatives of other rows' keys in `"key_to_key"`.
      axis_name: the mesh axis or axes of an enclosing `jax.shard_map` over which rows are
        sharded. The rows of all devices are then negatives.
      exchange: `"gather"` copies all keys to every device, `"ring"` passes them around;
        `jaxcl.ops.pairs.pair_logsumexp` documents the communication of each.
      implementation: an implementation of `jaxcl.ops.pairs`; `None` chooses one by size.

    Returns:
      The loss of each of this device's rows, in nats. Take the mean outside, as a global sum over a
      global count. Differentiate outside the `shard_map`.

    Raises:
      ValueError: if a name is unknown, shapes do not match, or an argument has no effect.

    Example:
      >>> import jax.numpy as jnp
      >>> sides = jnp.eye(2)
      >>> infonce_loss(sides, sides, temperature=1.0).round(4).tolist()
      [0.3133, 0.3133]

    Relations:
      A batch of one row has no negatives and a loss of 0. As $\tau \to 0$, $\tau \ell$ approaches
      the excess of the hardest negative's similarity over the positive's, or 0 if that is negative.

    Reference:
      van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
      equation 4; symmetric form: Radford et al., 2021, figure 3; all directions in one softmax:
      Li et al., "GTE", 2023; hardness: Lan et al., "LLaVE", 2025.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition!r} is unknown; use one of {', '.join(PARTITIONS)}")
    if jnp.ndim(temperature) and partition == "anchor":
        raise ValueError("partition='anchor' takes one temperature for all rows")
    check_numbers("hardness", hardness, Range(least=0))
    check_numbers("negative_hardness", negative_hardness, Range(least=0))
    tiers = (negatives or {}).values()
    separate = [tier for tier in tiers if not isinstance(tier, SharedNegatives)]
    if negative_hardness and not separate:
        raise ValueError(
            f"negative_hardness={negative_hardness} only affects explicit and separate negatives "
            "of a query; add some to negatives, or set it to 0"
        )
    comparison = Comparison(queries, keys, masks, axis_name, exchange, implementation)
    reduce = log_sum_exp(temperature, hardness=hardness, own_hardness=negative_hardness)
    log_sums = reduce_all(reduce, comparison, negatives, directions=directions)
    positives = inner_product(queries, keys) / temperature
    sets = list(log_sums.values())
    if partition == "joint":
        if set(SYMMETRIC) <= set(directions):
            sets.append(positives)  # the positive is in the matrix of both directions
        sets = [functools.reduce(log_add_exp, sets)]
    elif partition == "anchor":
        sets = [
            functools.reduce(log_add_exp, of_side)
            for side in ("query", "key")
            if (of_side := [log_sums[way] for way in log_sums if way.startswith(f"{side}_to")])
        ]
    # log(e^s + e^n) − s, without the difference of two large numbers.
    loss = jax.nn.softplus(jnp.stack(sets) - positives[None]).mean(0)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


def nt_xent_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] = 0.1,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""The SimCLR loss: a row's two views are positives, and all other views are negatives.

    With $N$ rows in the global batch, each view has $2N - 2$ negatives, from both sides. The
    value of a row is the mean over its two views, so the mean over rows is the loss of the paper.
    The loss equals `infonce_loss` with all directions and `partition="anchor"`.

    Args:
      queries: first views.
      keys: second views.
      temperature: $\tau > 0$.
      masks, negatives, axis_name, exchange, implementation: as for `LossFn`.

    Returns:
      The loss of each of this device's rows, in nats.

    Example:
      >>> import jax.numpy as jnp
      >>> nt_xent_loss(jnp.eye(2), jnp.eye(2), temperature=1.0).round(4).tolist()  # log(1 + 2 / e)
      [0.5514, 0.5514]

    Reference:
      Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
      equation 1.
    """
    return infonce_loss(
        queries,
        keys,
        temperature=temperature,
        directions=DIRECTIONS,
        partition="anchor",
        masks=masks,
        negatives=negatives,
        axis_name=axis_name,
        exchange=exchange,
        implementation=implementation,
    )


def decoupled_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    directions: tuple[str, ...] = SYMMETRIC,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE without the positive in its denominator, one value per query.

    $$\ell_i^{q \to k} = \log \sum_{j \ne i} m_{ij} e^{s_{ij}} - s_{ii}$$

    The gradient then does not vanish for well-aligned pairs, which helps small batches. The value
    may be negative. A row without negatives has the value 0. Arguments as for `infonce_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> decoupled_infonce_loss(jnp.eye(2), jnp.eye(2), temperature=1.0).tolist()  # log(e⁰) − 1
      [-1.0, -1.0]

    Reference:
      Yeh et al., "Decoupled Contrastive Learning", 2022, equation 6.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    comparison = Comparison(queries, keys, masks, axis_name, exchange, implementation)
    reduce = log_sum_exp(temperature)
    log_sums = reduce_all(reduce, comparison, negatives, directions=directions)
    positives = inner_product(queries, keys) / temperature
    sets = jnp.stack(list(log_sums.values()))
    loss = jnp.where(sets != -jnp.inf, sets - positives[None], 0).mean(0)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)


def hard_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    concentration: float = 1.0,
    positive_share: float = 0.0,
    directions: tuple[str, ...] = SYMMETRIC,
    masks: Masks = NO_MASKS,
    negatives: NegativesByName | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""Debiased InfoNCE with negatives weighted by their hardness.

    With $N_i$ negatives of row $i$,

    $$g_i = \max\Big(\frac{1}{1 - \pi}\Big(N_i \frac{\sum_j e^{(1 + \beta) s_{ij}}}
    {\sum_j e^{\beta s_{ij}}} - \pi N_i e^{s_{ii}}\Big),\; N_i e^{-1 / \tau}\Big), \qquad
    \ell_i = \log(e^{s_{ii}} + g_i) - s_{ii}.$$

    Other arguments as for `infonce_loss`.

    Args:
      queries: this device's queries.
      keys: this device's keys.
      temperature: $\tau > 0$.
      concentration: $\beta \ge 0$; 0 weights all negatives equally.
      positive_share: $\pi$ in [0, 1), the assumed share of false negatives.
      directions: anchors and candidates, as for `infonce_loss`.
      masks, negatives, axis_name, exchange, implementation: as for `LossFn`.

    Returns:
      The loss of each of this device's rows, in nats.

    Raises:
      ValueError: if the concentration or share is out of range, and as for `infonce_loss`.

    Relations:
      With $\beta = \pi = 0$ it equals `infonce_loss`.

    Reference:
      Robinson et al., "Contrastive Learning with Hard Negative Samples", 2021, equation 5; for
      $\beta = 0$: Chuang et al., "Debiased Contrastive Learning", 2020, equation 8.
    """
    queries, keys, masks = checked_batch(
        queries, keys, masks, directions=directions, temperature=temperature
    )
    check_numbers("concentration", concentration, Range(least=0))
    check_numbers("positive_share", positive_share, Range(least=0, below=1))
    reduced = functools.partial(
        reduce_all,
        comparison=Comparison(queries, keys, masks, axis_name, exchange, implementation),
        negatives=negatives,
        directions=directions,
    )

    def weighted(power: float) -> Float[Array, "_ q"]:
        return jnp.stack(list(reduced(log_sum_exp(temperature / power)).values()))

    counts = jnp.stack(list(reduced(COUNT).values()))
    nonempty = counts > 0
    log_counts = jnp.log(jnp.where(nonempty, counts, 1))
    positives = (inner_product(queries, keys) / temperature)[None]  # the same in each direction
    hard = jnp.where(nonempty, weighted(1 + concentration), 0)
    if concentration:
        hard += log_counts - jnp.where(nonempty, weighted(concentration), 0)
    # The share of the sum that the assumed false negatives contribute.
    share = positive_share * jnp.exp(jnp.minimum(positives + log_counts - hard, 80))
    valid_share = jnp.where(share < 1, share, 0)
    debiased = hard + jnp.log1p(-valid_share) - jnp.log1p(-positive_share)
    max_score = 1 / temperature  # a scalar, or one per row
    least = log_counts - (jnp.asarray(max_score)[None] if jnp.ndim(max_score) else max_score)
    debiased = jnp.where(share < 1, jnp.maximum(debiased, least), least)
    loss = jnp.where(nonempty, jax.nn.softplus(debiased - positives), 0).mean(0)
    return loss if masks.valid is None else jnp.where(masks.valid, loss, 0)
