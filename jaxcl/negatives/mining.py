"""Hard-negative mining: each query's hard negatives among all keys."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.negatives.masks import RELATIVE_MARGINS, similarity_ceilings
from jaxcl.ops.arguments import as_vectors
from jaxcl.ops.nearest import nearest
from jaxcl.ops.pairs import PairLabels
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Int, Key, Range, check_ranges

__all__ = [
    "SAMPLINGS",
    "Mined",
    "MiningRule",
    "allowed_candidates",
    "mine_negatives",
    "select_negatives",
]

SAMPLINGS = ("random", "top")


class MiningRule(NamedTuple):
    """The rule that selects a query's hard negatives among its nearest keys.

    Attributes:
      per_query: the maximum number of negatives per query.
      rank_range: first rank to use and first rank past the end. Ranks count from 0 among keys of
        other ids and groups. The nearest keys are left out because many are false negatives.
      margin: a negative's similarity is at least this much below the similarity of the positive,
        or of the least similar positive if there are several.
      relative_margin: like `margin`, but as a fraction of the positive's similarity.
      sampling: `"random"`, uniformly among the remaining keys; or `"top"`, the nearest of them.
      min_score: the minimum similarity of a negative.
      max_score: the maximum similarity of a negative.
    """

    per_query: Annotated[int, Range(least=1)] = 7
    rank_range: tuple[int, int] = (10, 100)
    margin: Annotated[float, Range()] | None = None
    relative_margin: Annotated[float, RELATIVE_MARGINS] | None = None
    sampling: str = "random"
    min_score: Annotated[float, Range()] | None = None
    max_score: Annotated[float, Range()] | None = None

    def check(self) -> None:
        """Raise a `ValueError` for a rule that can select nothing."""
        check_ranges(self)
        first, last = self.rank_range
        if not 0 <= first < last or last - first < self.per_query:
            raise ValueError(
                f"rank_range={first}:{last} has no room for {self.per_query} per query; give a "
                "range that begins at 0 or later and has at least that many ranks"
            )
        if self.margin is not None and self.relative_margin is not None:
            raise ValueError("margin and relative_margin are both given; choose one")
        least, most = self.min_score, self.max_score
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"min_score={least} is greater than max_score={most}; no "
                "similarity lies between them"
            )
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                f"sampling={self.sampling!r} is unknown; use one of {', '.join(SAMPLINGS)}"
            )


class Mined(NamedTuple):
    """The hard negatives of each query, the nearest first.

    Attributes:
      rows: row numbers in the whole table, padded with −1.
      similarities: similarities of these rows to the query, padded with −∞.
      ranks: ranks of these rows among the keys with other ids and groups, padded with −1.
    """

    rows: Int[Array | np.ndarray, "q n"]
    similarities: Float[Array | np.ndarray, "q n"]
    ranks: Int[Array | np.ndarray, "q n"]


def mine_negatives(
    queries: Float[Array, "q d"],
    positives: Float[Array, "q d"],
    table: Float[Array, "n d"],
    *,
    rule: MiningRule,
    row_keys: Key[Array, " q"],
    query_labels: PairLabels,
    table_labels: PairLabels,
    axis_name: AxisName | None = None,
) -> Mined:
    """Find each query's hard negatives by exact search over the keys of all devices.

    Args:
      queries: this device's queries.
      positives: the queries' keys.
      table: this device's keys.
      rule: the rule that selects negatives.
      row_keys: a random key for each query.
      query_labels: the queries' labels, which mask keys that are not negatives.
      table_labels: the keys' labels.
      axis_name: the mesh axes over which queries and keys are sharded.

    Raises:
      ValueError: for a rule that can select nothing.

    Example:
      >>> import jax
      >>> keys = jax.nn.one_hot(jnp.arange(4), 4)
      >>> labels = PairLabels(different=(jnp.arange(4),))
      >>> mined = mine_negatives(
      ...     keys + 0.1 * jnp.arange(4), keys, keys, rule=MiningRule(1, (0, 2), sampling="top"),
      ...     row_keys=jax.random.split(jax.random.key(0), 4), query_labels=labels,
      ...     table_labels=labels,
      ... )
      >>> mined.rows.tolist()
      [[3], [3], [3], [2]]

    Reference:
      Ranks between 10 and 100 or so: Xiong et al., "ANCE", 2021. Margins: de Souza Moreira et al.,
      "NV-Retriever", 2024.
    """
    rule.check()
    queries, positives = as_vectors("queries", queries), as_vectors("positives", positives)
    first, last = rule.rank_range
    neighbours = nearest(
        queries,
        table,
        count=last,
        query_labels=query_labels,
        table_labels=table_labels,
        axis_name=axis_name,
    )
    return select_negatives(
        neighbours.rows[:, first:],
        neighbours.similarities[:, first:],
        inner_product(queries, positives),
        rule=rule,
        row_keys=row_keys,
    )


def select_negatives(
    rows: Int[Array, "q n"],
    scores: Float[Array, "q n"],
    positive_scores: Float[Array, " q"],
    *,
    rule: MiningRule,
    row_keys: Key[Array, " q"],
) -> Mined:
    """Select each query's negatives among the keys in the range of ranks.

    Args:
      rows: the keys' rows, the nearest first; −1 where there are too few.
      scores: similarities of these keys to the query, by the model or by a guide model.
      positive_scores: the similarity of each query's positive, by the same model.
      rule: the rule that selects negatives; the first column of `rows` has the first rank of its
        range.
      row_keys: a random key for each query.
    """
    first, last = rule.rank_range
    width = last - first
    present = allowed_candidates(rows, scores, positive_scores, rule=rule)
    ranks = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), rows.shape)
    if rule.sampling == "random":
        # Always float32, since enabling 64-bit types would otherwise change the draws.
        order = jax.vmap(lambda key: jax.random.uniform(key, (width,), jnp.float32))(row_keys)
    else:
        order = ranks / width
    # Both orders lie in [0, 1), so that 2 sorts masked keys last. The second sort returns the
    # selection to the order of ranks; a query with too few keys has `width` in the last places.
    places = jnp.argsort(jnp.where(present, order, 2), axis=1)[:, : rule.per_query]
    places = jnp.sort(jnp.where(jnp.take_along_axis(present, places, 1), places, width), axis=1)
    is_selected = places < width
    places = jnp.minimum(places, width - 1)  # in range for the lookups, whose results are masked
    return Mined(
        rows=jnp.where(is_selected, jnp.take_along_axis(rows, places, 1), -1),
        similarities=jnp.where(is_selected, jnp.take_along_axis(scores, places, 1), -jnp.inf),
        ranks=jnp.where(is_selected, first + jnp.take_along_axis(ranks, places, 1), -1),
    )


def allowed_candidates(
    rows: Int[Array, "q n"],
    scores: Float[Array, "q n"],
    positive_scores: Float[Array, " q"],
    *,
    rule: MiningRule,
) -> Bool[Array, "q n"]:
    """The mask of the nearest keys that satisfy the margin and the limits of a rule."""
    allowed = rows >= 0
    ceilings = similarity_ceilings(
        positive_scores, margin=rule.margin, relative_margin=rule.relative_margin
    )
    if ceilings is not None:
        allowed &= scores <= ceilings[:, None]
    if rule.min_score is not None:
        allowed &= scores >= rule.min_score
    if rule.max_score is not None:
        allowed &= scores <= rule.max_score
    return allowed
