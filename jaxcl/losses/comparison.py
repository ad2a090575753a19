"""The comparison of a batch's rows that all losses share: directions, labels and masks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.negatives.masks import batch_labels, similarity_ceilings
from jaxcl.ops.pairs import PairLabels, pair_count, pair_logsumexp
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Integer

__all__ = ["DIRECTIONS", "Comparison", "check_sides", "own_products"]

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
"""Anchors and candidates: in `"query_to_key"`, each query is an anchor and all keys candidates."""


class Comparison(NamedTuple):
    """The arguments that all losses of a batch share; `infonce_loss` documents them."""

    ids: Integer[Array, " q"] | None
    groups: Integer[Array, " q"] | None
    valid: Bool[Array, " q"] | None
    margin: float | None
    relative_margin: float | None
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None
    axis_name: AxisName | None
    exchange: str
    implementation: str | None

    def negatives(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        *,
        temperature: float | Array,
        directions: tuple[str, ...],
        hardness: float = 0.0,
    ) -> dict[str, Float[Array, " q"]]:
        """The log-sum-exp of each row's negatives by direction, in nats; −∞ for no negatives."""
        reduce = functools.partial(pair_logsumexp, temperature=temperature, hardness=hardness)
        return self.reduced(reduce, queries, keys, directions)

    def negatives_of_rows(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        *,
        temperature: Float[Array, " q"],
        direction: str,
    ) -> Float[Array, " q"]:
        """The same for one direction, with one temperature per anchor."""
        if direction == "key_to_query":
            # Only the rows of a product can have separate temperatures, so that the anchors, here
            # the keys, become its rows, with their guides.
            guides = None if self.guides is None else self.guides[::-1]
            queries, keys, direction = keys, queries, "query_to_key"
            swapped = self._replace(guides=guides)
        else:
            swapped = self
        found = swapped.negatives(queries, keys, temperature=temperature, directions=(direction,))
        return found[direction]

    def counts(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        *,
        directions: tuple[str, ...],
    ) -> dict[str, Float[Array, " q"]]:
        """The number of each row's negatives, by direction."""
        return self.reduced(pair_count, queries, keys, directions)

    def reduced(
        self,
        reduce: Callable,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        directions: tuple[str, ...],
    ) -> dict[str, Float[Array, " q"]]:
        """An operation of `jaxcl.ops.pairs` on each row's negatives, by direction."""
        found: dict[str, Float[Array, " q"]] = {}
        query_guide, key_guide = (None, None) if self.guides is None else self.guides
        if {"query_to_key", "key_to_query"} & set(directions):
            # One product for both directions. Only anchors bring ceilings: another row's margin
            # must not mask pairs of a direction in which that row has no loss.
            rows, columns = reduce(
                queries,
                keys,
                query_labels=self.labels(
                    queries, keys, query_guide, ceiling="query_to_key" in directions
                ),
                key_labels=self.labels(
                    queries, keys, key_guide, ceiling="key_to_query" in directions
                ),
                **self.how(),
            )
            found |= {"query_to_key": rows, "key_to_query": columns}
        for direction, own, guide in (
            ("query_to_query", queries, query_guide),
            ("key_to_key", keys, key_guide),
        ):
            if direction in directions:
                found[direction], _ = reduce(
                    own,
                    own,
                    query_labels=self.labels(queries, keys, guide),
                    key_labels=self.labels(queries, keys, guide, ceiling=False),
                    **self.how(),
                )
        return {direction: found[direction] for direction in directions}

    def ceilings(
        self, queries: Float[Array, "q d"], keys: Float[Array, "q d"]
    ) -> Float[Array, " q"] | None:
        """The greatest similarity at which a negative of each row is allowed; `None` for all."""
        ceilings = similarity_ceilings(
            inner_product(*((queries, keys) if self.guides is None else self.guides)),
            margin=self.margin,
            relative_margin=self.relative_margin,
        )
        if ceilings is None and self.guides is not None:
            raise ValueError("guides judge by a margin; give margin or relative_margin (0 will do)")
        return ceilings

    def how(self) -> dict[str, Any]:
        """The arguments of every reduction: how devices exchange keys, and the implementation."""
        return {
            "axis_name": self.axis_name,
            "exchange": self.exchange,
            "implementation": self.implementation,
        }

    def labels(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        guide: Float[Array, "q g"] | None,
        *,
        ceiling: bool = True,
    ) -> PairLabels:
        """One side's labels, with the ceilings of its rows if these are anchors."""
        labels = batch_labels(
            queries.shape[0],
            ids=self.ids,
            groups=self.groups,
            valid=self.valid,
            axis_name=self.axis_name,
        )
        ceilings = self.ceilings(queries, keys)
        if ceilings is None:
            return labels
        return labels._replace(
            ceiling=ceilings if ceiling else None,
            guide=None if guide is None else lax.stop_gradient(guide),
        )


def own_products(rows: Float[Array, "q d"], vectors: Float[Array, "q n d"]) -> Float[Array, "q n"]:
    """Each row's inner products with its separate vectors, summed in float32 or wider."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.einsum("qd,qnd->qn", rows, vectors, preferred_element_type=wide)


def check_sides(
    queries: Float[Array, "..."], keys: Float[Array, "..."], directions: tuple[str, ...]
) -> None:
    """Raise a `ValueError` for sides of different shapes, or an unknown direction."""
    if (
        not directions
        or set(directions) - set(DIRECTIONS)
        or len(set(directions)) < len(directions)
    ):
        raise ValueError(
            f"directions={directions!r}: give one or more of {', '.join(DIRECTIONS)}, each once"
        )
    if queries.shape != keys.shape:
        raise ValueError(
            f"queries have the shape {queries.shape} and keys {keys.shape}; row i of one belongs "
            "to row i of the other, so give as many, of one width"
        )
