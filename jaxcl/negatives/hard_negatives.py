"""Hard negatives of queries among any keys, as NumPy arrays: exact search over all devices."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcl.negatives.key_search import make_key_search
from jaxcl.negatives.mining import Mined, MiningRule, allowed_candidates, select_negatives
from jaxcl.negatives.pair_scores import PairScores, lowest_scores, scores_of
from jaxcl.ops.arguments import as_integers
from jaxcl.ops.mesh import default_settings, make_mesh
from jaxcl.typing import Array, Bool, Float, Int, Integer, Key

__all__ = [
    "BLOCK_ROWS",
    "HardNegatives",
    "QueryBlock",
    "make_miner",
    "mine_hard_negatives",
]

BLOCK_ROWS = 4_096
"""The number of queries to search for at a time."""

Rows = Sequence[Any] | Integer[Array | np.ndarray, "..."]
"""A row number per query, or several: a list of lists, or an array padded with negative numbers."""


class HardNegatives(NamedTuple):
    """The hard negatives of each query, the nearest first.

    Attributes:
      rows: rows of the keys, padded with −1.
      scores: similarities of these keys to the query, by the guide if there is one; padded with −∞.
      ranks: ranks of these keys by the model, among all keys except the query's positives; padded
        with −1.
      positive_scores: the similarity of the query's least similar positive, by the guide if there
        is one; NaN without a positive.
      masked: the number of keys in the range of ranks that the margin or a limit excludes.
    """

    rows: Int[np.ndarray, "q n"]
    scores: Float[np.ndarray, "q n"]
    ranks: Int[np.ndarray, "q n"]
    positive_scores: Float[np.ndarray, " q"]
    masked: Int[np.ndarray, " q"]


class QueryBlock(NamedTuple):
    """Queries that are searched for together.

    Attributes:
      numbers: each query's number among all queries, which decides its random draws.
      vectors: embeddings of the queries.
      positives: rows of each query's positives among the keys.
      excluded: rows of other keys that must not be negatives of each query.
      groups: labels of the queries, one array for each array of labels of the keys.
      guide: the guide model's embeddings of the queries.
    """

    numbers: Int[np.ndarray, " q"]
    vectors: Float[Array | np.ndarray, "q d"]
    positives: Rows
    excluded: Rows | None = None
    groups: tuple[Integer[Array | np.ndarray, " q"], ...] = ()
    guide: Float[Array | np.ndarray, "q g"] | None = None


Miner = Callable[[QueryBlock], HardNegatives]


def mine_hard_negatives(
    queries: Float[Array | np.ndarray, "q d"],
    keys: Float[Array | np.ndarray, "k d"],
    *,
    positives: Rows,
    rule: MiningRule = MiningRule(),  # noqa: B008 - immutable
    excluded: Rows | None = None,
    candidates: Bool[Array | np.ndarray, " k"] | None = None,
    query_groups: Integer[Array | np.ndarray, " q"] | None = None,
    key_groups: Integer[Array | np.ndarray, " k"] | None = None,
    guide_queries: Float[Array | np.ndarray, "q g"] | None = None,
    guide_keys: Float[Array | np.ndarray, "k g"] | None = None,
    seed: int = 0,
    block_rows: int = BLOCK_ROWS,
    mesh: Mesh | None = None,
) -> HardNegatives:
    """Mine the hard negatives of queries among keys.

    Keys are ranked by inner product, so give unit vectors for cosine similarity. Among keys that
    are equally similar, the lower row comes first. The keys lie on the devices, which compare them
    with `block_rows` queries at a time.

    Without a margin or limit, a key that answers the query but is not among its positives may be
    mined. A margin, or a range of ranks that begins at 10 or later, leaves out most of these false
    negatives.

    Args:
      queries: an embedding per query.
      keys: an embedding per key, such as a document of a corpus.
      positives: the rows of each query's positives, which are never its negatives: one row per
        query, a list of rows per query, or an array `[q, p]` padded with negative numbers. A margin
        is measured from the least similar positive.
      rule: the number of negatives, their range of ranks, and their margin below the positive.
      excluded: rows of other keys that must not be negatives of a query, such as copies of the
        query, in the form of `positives`.
      candidates: the keys that may be negatives; all by default. Other keys can only be positives.
      query_groups: a label per query, such as its class; needs `key_groups`.
      key_groups: a label per key; no query has negatives with its own label.
      guide_queries: embeddings of the queries by a guide model. Margins and limits then apply to
        its similarities; ranks are still computed from `queries` and `keys`.
      guide_keys: embeddings of the keys by the guide model.
      seed: the seed of the random draws, for `sampling="random"`. The draws do not depend on the
        number of devices or on `block_rows`.
      block_rows: the number of queries to search for at a time.
      mesh: the devices; all by default. Several processes must make the same call.

    Returns:
      Negatives as NumPy arrays, padded with −1 where a query has fewer than `rule.per_query`.

    Raises:
      ValueError: for shapes that do not match, rows out of range, vectors that are not finite, a
        margin for a query without positives, a guide without a margin or limit, or a rule that can
        select nothing.
      TypeError: for rows that are not integers.

    Example:
      >>> keys = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
      >>> mined = mine_hard_negatives(
      ...     np.array([[1.0, 0.0], [0.0, 1.0]]),
      ...     keys,
      ...     positives=[[0], [3, 2]],
      ...     rule=MiningRule(per_query=2, rank_range=(0, 4), margin=0.3, sampling="top"),
      ... )
      >>> mined.rows.tolist()  # key 1 is too similar to the first query's positive
      [[2, 3], [0, -1]]
      >>> mined.scores[0].round(2).tolist(), mined.positive_scores.round(2).tolist()
      ([0.6, 0.0], [1.0, 0.8])

    Reference:
      Ranks: Xiong et al., "ANCE", 2021. Margins: de Souza Moreira et al., "NV-Retriever", 2024.
      Guide models: Solatorio, "GISTEmbed", 2024.
    """
    arguments: dict[str, Any] = {
        "positives": positives,
        "excluded": excluded,
        "query_groups": query_groups,
        "guide_queries": guide_queries,
    }
    num_queries = len(queries)
    _check_given(arguments, num_queries)
    for query_argument, key_values in (("query_groups", key_groups), ("guide_queries", guide_keys)):
        if (arguments[query_argument] is None) != (key_values is None):
            name = {"query_groups": "key_groups", "guide_queries": "guide_keys"}[query_argument]
            raise ValueError(f"give {query_argument} and {name} together, or neither")
    if block_rows < 1:
        raise ValueError(f"block_rows={block_rows}; give at least 1")
    mine = make_miner(
        keys,
        rule=rule,
        candidates=candidates,
        groups=() if key_groups is None else (key_groups,),
        guide=guide_keys,
        seed=seed,
        block_rows=min(block_rows, max(num_queries, 1)),
        mesh=mesh,
    )
    blocks = []
    for first in range(0, max(num_queries, 1), block_rows):
        here = slice(first, first + block_rows)
        part: Any = {
            name: value if value is None else value[here] for name, value in arguments.items()
        }
        blocks.append(
            mine(
                QueryBlock(
                    np.arange(num_queries)[here],
                    queries[here],
                    part["positives"],
                    part["excluded"],
                    () if query_groups is None else (part["query_groups"],),
                    part["guide_queries"],
                )
            )
        )
    return HardNegatives(*map(np.concatenate, zip(*blocks, strict=True)))


def _check_given(arguments: Mapping[str, Any], num_queries: int) -> None:
    for name, values in arguments.items():
        if values is not None and len(values) != num_queries:
            raise ValueError(
                f"{name} has {len(values)} entries; give one for each of the {num_queries} queries"
            )


def make_miner(
    keys: Float[Array | np.ndarray, "k d"],
    *,
    rule: MiningRule,
    candidates: Bool[Array | np.ndarray, " k"] | None = None,
    groups: tuple[Integer[Array | np.ndarray, " k"], ...] = (),
    guide: Float[Array | np.ndarray, "k g"] | None = None,
    pair_scores: PairScores | None = None,
    seed: int = 0,
    block_rows: int = BLOCK_ROWS,
    mesh: Mesh | None = None,
) -> Miner:
    """Put keys on the devices, and return a function that mines blocks of queries.

    `mine_hard_negatives` describes the arguments, except for these:

    Args:
      groups: labels in which a query and its negatives must differ.
      pair_scores: the scores to which margins and limits apply, instead of a guide's similarities;
        for example from a re-ranker. Keys without a score are not mined.
      block_rows: the maximum number of queries in a block.

    Raises:
      ValueError: for keys or a guide that are not finite or do not fit, or a rule that can select
        nothing; from the function, also for a positive without a score.
    """
    rule.check()
    guided = guide is not None or pair_scores is not None
    if guided and not (_has_margin(rule) or _has_limit(rule)):
        raise ValueError(
            "a guide decides about margins and limits, but the rule has none; set margin, "
            "relative_margin, min_score or max_score"
        )
    keys = _as_matrix("keys", keys)
    judging = keys if guide is None else _as_matrix("guide_keys", guide)
    mesh = mesh or make_mesh({"data": -1})
    search = make_key_search(keys, candidates, groups, block_rows=block_rows, mesh=mesh)
    if len(judging) != len(keys):
        raise ValueError(f"guide_keys has {len(judging)} rows; give one for each of {len(keys)}")
    if len(keys) <= rule.rank_range[0]:
        raise ValueError(f"there are {len(keys)} keys, none of rank {rule.rank_range[0]}")

    def mine(block: QueryBlock) -> HardNegatives:
        vectors, judged = _vectors_of(block, keys, judging if guide is not None else None)
        positives = _padded_rows("positives", block.positives, len(keys))
        if _has_margin(rule):
            _check_positives(block.numbers, positives)
        excluded = positives
        if block.excluded is not None:
            more = _padded_rows("excluded", block.excluded, len(keys))
            excluded = np.concatenate([positives, more], axis=1)
        score = functools.partial(scores_of, judged, judging)
        if pair_scores is not None:
            score = functools.partial(pair_scores, block.numbers)
        positive_scores = lowest_scores(score(positives), positives, block.numbers)
        with default_settings(mesh):
            neighbours = search(vectors, block.groups, excluded, rule.rank_range)
            scores = score(neighbours.rows) if guided else neighbours.similarities
            rows = np.where(np.isnan(scores), -1, neighbours.rows)
            numbers = block.numbers.astype(np.int32)
            key = jax.random.key(seed)
            mined, masked = _select(rows, scores, positive_scores, key, numbers, rule=rule)
        rows, scores, ranks, masked = (np.asarray(part) for part in (*mined, masked))
        return HardNegatives(rows, scores, ranks, positive_scores, masked)

    return mine


def _vectors_of(
    block: QueryBlock, keys: np.ndarray, guide: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The queries' embeddings by the model, for ranks, and by the guide, for margins and limits."""
    first = int(block.numbers[0]) if len(block.numbers) else 0
    vectors = guided = _as_matrix("queries", block.vectors, first)
    if guide is not None:
        guided = _as_matrix("guide_queries", block.guide, first)
    for name, left, right in (("queries", vectors, keys), ("guide_queries", guided, guide)):
        if right is not None and left.shape[1] != right.shape[1]:
            raise ValueError(
                f"{name} have {left.shape[1]} features, but their keys have {right.shape[1]}"
            )
    return vectors, guided


def _check_positives(numbers: np.ndarray, positives: Integer[np.ndarray, "q p"]) -> None:
    without = (positives < 0).all(1)
    if without.any():
        raise ValueError(
            f"query {numbers[without][0]} has no positives, but margins are relative to them; "
            "omit the query or the margin"
        )


def _has_margin(rule: MiningRule) -> bool:
    return rule.margin is not None or rule.relative_margin is not None


def _has_limit(rule: MiningRule) -> bool:
    return rule.min_score is not None or rule.max_score is not None


@functools.partial(jax.jit, static_argnames="rule")
def _select(
    rows: Int[Array, "q n"],
    scores: Float[Array, "q n"],
    positive_scores: Float[Array, " q"],
    key: Key[Array, ""],
    numbers: Int[Array, " q"],
    *,
    rule: MiningRule,
) -> tuple[Mined, Int[Array, " q"]]:
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    mined = select_negatives(rows, scores, positive_scores, rule=rule, row_keys=row_keys)
    allowed = allowed_candidates(rows, scores, positive_scores, rule=rule)
    return mined, (rows >= 0).sum(1, dtype=jnp.int32) - allowed.sum(1, dtype=jnp.int32)


def _padded_rows(name: str, rows: Rows, num_keys: int) -> Int[np.ndarray, "q p"]:
    """Rows of keys per query as an array, padded with −1."""
    if isinstance(rows, np.ndarray | jax.Array):
        table = as_integers(name, rows)
        table = table[:, None] if table.ndim == 1 else table
    else:
        lists = [np.atleast_1d(as_integers(name, one)) for one in rows]
        width = max(map(len, lists), default=0)
        table = np.full((len(lists), width), -1, np.int64)
        for number, one in enumerate(lists):
            table[number, : len(one)] = one
    if table.size and table.max() >= num_keys:
        raise ValueError(f"{name} holds row {table.max()}, but there are {num_keys} keys")
    return np.maximum(table, -1).astype(np.int64)


def _as_matrix(name: str, vectors: Any, number: int = 0) -> Float[np.ndarray, "n d"]:
    """Embeddings in float32 on the host, numbered from `number` in messages.

    A memory-mapped float32 array stays memory-mapped.
    """
    if not isinstance(vectors, jax.Array | np.ndarray) or vectors.ndim != 2 or not vectors.shape[1]:
        kind = getattr(vectors, "shape", type(vectors).__name__)
        raise ValueError(f"{name} is {kind}; give an array [rows, features] of floats")
    if not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise ValueError(f"{name} has the type {vectors.dtype}; give floats")
    matrix = np.asarray(vectors, np.float32)
    for first in range(0, len(matrix), BLOCK_ROWS):
        finite = np.isfinite(matrix[first : first + BLOCK_ROWS]).all(1)
        if not finite.all():
            row = number + first + int(np.argmin(finite))
            raise ValueError(f"{name}: the vector of row {row} is not finite; leave out that row")
    return matrix
