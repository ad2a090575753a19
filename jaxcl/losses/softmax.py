"""InfoNCE and its relatives: the cross entropy of finding a query's key among all keys."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcl.losses.beyond_batch import check_explicit, log_sum_exp, of_explicit, of_tiers
from jaxcl.losses.comparison import Comparison, check_sides
from jaxcl.negatives.sets import OwnNegatives, SharedNegatives
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Integer

__all__ = ["PARTITIONS", "decoupled_infonce_loss", "hard_infonce_loss", "infonce_loss"]

PARTITIONS = ("separate", "joint")

_SYMMETRIC = ("query_to_key", "key_to_query")


def infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.05,
    directions: tuple[str, ...] = _SYMMETRIC,
    partition: str = "separate",
    hardness: float = 0.0,
    negatives: Float[Array, "q n d"] | None = None,
    negative_ids: Integer[Array, "q n"] | None = None,
    negative_groups: Integer[Array, "q n"] | None = None,
    negatives_valid: Bool[Array, "q n"] | None = None,
    negative_guides: Float[Array, "q n g"] | None = None,
    negative_hardness: float = 0.0,
    tiers: Mapping[str, SharedNegatives | OwnNegatives] | None = None,
    ids: Integer[Array, " q"] | None = None,
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE with in-batch negatives from every device, one value per query.

    With $s_{ij} = \langle q_i, k_j\rangle / \tau$ and $m_{ij}$ saying which pairs count,

    $$\ell_i^{q \to k} = \log\big(e^{s_{ii}} + \sum_{j \ne i} m_{ij} e^{s_{ij}}\big) - s_{ii},
    \qquad
    \ell_i^{k \to q} = \log\big(e^{s_{ii}} + \sum_{j \ne i} m_{ji} e^{s_{ji}}\big) - s_{ii},$$

    and in `"query_to_query"` and `"key_to_key"` a row's negatives are those of its own side. The
    value is the mean over the directions, or one softmax over the negatives of all of them. The
    first two come from one product; no matrix is stored but a tile of it.

    Args:
      queries: this device's queries, of unit norm in general; row `i` belongs to key `i`.
      keys: this device's keys. Their gradient covers what every device's queries ask of them.
      temperature: $\tau > 0$, for all or by row; it may be learned. 0.05 suits unit vectors.
      directions: who looks among whom; of `"query_to_key"`, `"key_to_query"`, `"query_to_query"`
        and `"key_to_key"`.
      partition: `"separate"`, the mean of one softmax per direction, or `"joint"`, one over all, in
        which the positive stands once for each of the first two directions.
      hardness: $\alpha \ge 0$: the weight of each negative that comes from another row is
        multiplied by $e^{\alpha \langle q_i, k_j\rangle}$, held constant in the gradient.
      negatives: explicit negatives of each row, such as mined ones. They stand against every query
        of the batch in the direction `"query_to_key"`, and against the keys of other rows in
        `"key_to_key"`.
      negative_ids: which rows' keys they are, so that no query meets its own key; needs `ids`.
      negative_groups: their groups; needs `groups`.
      negatives_valid: `False` where a row has fewer.
      negative_guides: their embeddings by the model of `guides`, needed with it.
      negative_hardness: as `hardness`, for negatives that a query has for itself.
      tiers: further keys by name, such as a memory bank's (`jaxcl.negatives.tiers`). They stand
        against queries in the direction `"query_to_key"`, under all masks.
      ids: row numbers. Two rows of one id are never each other's negative, so that a row that a
        batch holds twice does no harm.
      groups: labels. Two rows of one group are never each other's negative.
      valid: `False` for padding, which counts for nobody and has the value 0.
      margin: a negative that is not at least so much less similar than the row's own positive does
        not count: it may be a positive. In both directions, the row of either side decides.
      relative_margin: the same as a share of the positive's similarity.
      guides: embeddings of both sides by a model that judges similarity in place of this one.
      axis_name: the mesh axis or axes of an enclosing `jax.shard_map` over which rows are
        sharded. All devices' rows are then negatives.
      exchange: `"gather"` holds all keys on every device, `"ring"` passes them round; what each
        moves is written at `jaxcl.ops.pairs.pair_logsumexp`.
      implementation: of `jaxcl.ops.pairs`; `None` for the best that runs here.

    Returns:
      The loss of each of this device's rows, in nats. Reduce it outside: a mean over devices is a
      global sum over a global count. Differentiate outside of the `shard_map`.

    Raises:
      ValueError: for an unknown name, sides of different shapes, or arguments that cancel.

    Example:
      >>> import jax.numpy as jnp
      >>> sides = jnp.eye(2)
      >>> infonce_loss(sides, sides, temperature=1.0).round(4).tolist()
      [0.3133, 0.3133]

    Relations:
      A batch of one row has no negatives and costs 0. As $\tau \to 0$ the loss nears the gap
      between the best counted score and the positive's, over $\tau$.

    Reference:
      van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018,
      equation 4; the symmetric form is that of Radford et al., 2021, figure 3; all directions in
      one softmax, Li et al., "GTE", 2023; hardness, Lan et al., "LLaVE", 2025.
    """
    check_sides(queries, keys, directions)
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition!r} is unknown; use one of {', '.join(PARTITIONS)}")
    if hardness < 0 or negative_hardness < 0:
        raise ValueError(
            f"hardness={hardness}, negative_hardness={negative_hardness}; both must be at least 0"
        )
    comparison = Comparison(
        ids, groups, valid, margin, relative_margin, guides, axis_name, exchange, implementation
    )
    found = comparison.negatives(
        queries, keys, temperature=temperature, directions=directions, hardness=hardness
    )
    reduce = log_sum_exp(temperature, hardness=hardness, own_hardness=negative_hardness)
    if negatives is None:
        _check_unused(
            negative_ids=negative_ids,
            negative_groups=negative_groups,
            negatives_valid=negatives_valid,
            negative_guides=negative_guides,
            negative_hardness=None if tiers else negative_hardness or None,
        )
    else:
        more = OwnNegatives(
            negatives, negative_ids, negative_groups, negatives_valid, negative_guides
        )
        check_explicit(comparison, more, queries)
        explicit = of_explicit(reduce, comparison, queries, keys, more, directions=directions)
        found |= {name: jnp.logaddexp(found[name], theirs) for name, theirs in explicit.items()}
    if tiers:
        if "query_to_key" not in directions:
            raise ValueError(f"tiers hold keys, and no query looks for one in {directions}")
        for theirs in of_tiers(reduce, comparison, queries, keys, tiers).values():
            found["query_to_key"] = jnp.logaddexp(found["query_to_key"], theirs)
    positives = inner_product(queries, keys) / temperature
    sets = list(found.values())
    if partition == "joint":
        if set(_SYMMETRIC) <= set(directions):
            sets.append(positives)  # it stands in the matrix of either direction
        sets = [functools.reduce(jnp.logaddexp, sets)]
    # log(e^s + e^n) − s, without the difference of two large numbers.
    loss = jax.nn.softplus(jnp.stack(sets) - positives).mean(0)
    return loss if valid is None else jnp.where(valid, loss, 0)


def decoupled_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    directions: tuple[str, ...] = _SYMMETRIC,
    ids: Integer[Array, " q"] | None = None,
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE whose denominator leaves the positive out, one value per query.

    $$\ell_i^{q \to k} = \log \sum_{j \ne i} m_{ij} e^{s_{ij}} - s_{ii}$$

    A pair that is well aligned already then loses none of its gradient, which helps small batches.
    It may be negative. A row without negatives has the value 0. Arguments as for `infonce_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> decoupled_infonce_loss(jnp.eye(2), jnp.eye(2), temperature=1.0).tolist()  # log(e⁰) − 1
      [-1.0, -1.0]

    Reference:
      Yeh et al., "Decoupled Contrastive Learning", 2022, equation 6.
    """
    check_sides(queries, keys, directions)
    comparison = Comparison(
        ids, groups, valid, margin, relative_margin, guides, axis_name, exchange, implementation
    )
    found = comparison.negatives(queries, keys, temperature=temperature, directions=directions)
    positives = inner_product(queries, keys) / temperature
    sets = jnp.stack(list(found.values()))
    loss = jnp.where(sets != -jnp.inf, sets - positives, 0).mean(0)
    return loss if valid is None else jnp.where(valid, loss, 0)


def hard_infonce_loss(
    queries: Float[Array, "q d"],
    keys: Float[Array, "q d"],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " q"] = 0.1,
    concentration: float = 1.0,
    positive_share: float = 0.0,
    directions: tuple[str, ...] = _SYMMETRIC,
    ids: Integer[Array, " q"] | None = None,
    groups: Integer[Array, " q"] | None = None,
    valid: Bool[Array, " q"] | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None = None,
    axis_name: AxisName | None = None,
    exchange: str = "gather",
    implementation: str | None = None,
) -> Float[Array, " q"]:
    r"""InfoNCE over negatives that are drawn, in effect, the harder the likelier; debiased.

    With $N_i$ negatives of row $i$,

    $$g_i = \max\Big(\frac{1}{1 - \pi}\Big(N_i \frac{\sum_j e^{(1 + \beta) s_{ij}}}
    {\sum_j e^{\beta s_{ij}}} - \pi N_i e^{s_{ii}}\Big),\; N_i e^{-1 / \tau}\Big), \qquad
    \ell_i = \log(e^{s_{ii}} + g_i) - s_{ii}.$$

    Arguments as for `infonce_loss`, besides:

    Args:
      queries: this device's queries.
      keys: this device's keys.
      temperature: $\tau > 0$.
      concentration: $\beta \ge 0$; 0 weighs all negatives alike.
      positive_share: $\pi$ in [0, 1): how many of the negatives are taken to be positives in truth.
      directions: who looks among whom.
      ids: row numbers.
      groups: labels.
      valid: `False` for padding.
      margin: as a difference to the positive's similarity.
      relative_margin: as a share of it.
      guides: who judges similarity.
      axis_name: the mesh axes over which rows are sharded.
      exchange: `"gather"` or `"ring"`.
      implementation: of `jaxcl.ops.pairs`.

    Returns:
      The loss of each of this device's rows, in nats.

    Raises:
      ValueError: for a concentration or share out of range, and as `infonce_loss`.

    Relations:
      With $\beta = \pi = 0$ it is `infonce_loss`.

    Reference:
      Robinson et al., "Contrastive Learning with Hard Negative Samples", 2021, equation 5; with
      $\beta = 0$ Chuang et al., "Debiased Contrastive Learning", 2020, equation 8.
    """
    check_sides(queries, keys, directions)
    if concentration < 0 or not 0 <= positive_share < 1:
        raise ValueError(
            f"concentration={concentration} must be at least 0, and "
            f"positive_share={positive_share} in [0, 1)"
        )
    comparison = Comparison(
        ids, groups, valid, margin, relative_margin, guides, axis_name, exchange, implementation
    )

    def weighed(power: float) -> Float[Array, "_ q"]:
        found = comparison.negatives(
            queries, keys, temperature=temperature / power, directions=directions
        )
        return jnp.stack(list(found.values()))

    counts = jnp.stack(list(comparison.counts(queries, keys, directions=directions).values()))
    some = counts > 0
    log_counts = jnp.log(jnp.where(some, counts, 1))
    positives = inner_product(queries, keys) / temperature
    hard = jnp.where(some, weighed(1 + concentration), 0)
    if concentration:
        hard += log_counts - jnp.where(some, weighed(concentration), 0)
    # What the positives among them are taken to hold, as a share of it all.
    share = positive_share * jnp.exp(jnp.minimum(positives + log_counts - hard, 80))
    less_than_all = jnp.where(share < 1, share, 0)
    debiased = hard + jnp.log1p(-less_than_all) - jnp.log1p(-positive_share)
    least = log_counts - 1 / temperature
    debiased = jnp.where(share < 1, jnp.maximum(debiased, least), least)
    loss = jnp.where(some, jax.nn.softplus(debiased - positives), 0).mean(0)
    return loss if valid is None else jnp.where(valid, loss, 0)


def _check_unused(**arguments: object) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} without negatives, which they describe; give both")
