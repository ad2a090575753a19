"""Directions, labels and masks for comparing the rows of a batch, shared by all losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax

from jaxcl.losses.protocol import Masks
from jaxcl.negatives.masks import batch_labels, similarity_ceilings
from jaxcl.ops.arguments import as_vectors, check_numbers, label_fields
from jaxcl.ops.pairs import PairLabels
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Float, Range

__all__ = ["DIRECTIONS", "SYMMETRIC", "TEMPERATURES", "Comparison", "checked_batch"]

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
"""Anchors and candidates: in `"query_to_key"`, queries are anchors and keys are candidates."""

SYMMETRIC = DIRECTIONS[:2]

TEMPERATURES = Range(above=0)


class Comparison(NamedTuple):
    """The comparison of a batch's rows: allowed pairs, and the exchange between devices."""

    queries: Float[Array, "q d"]
    keys: Float[Array, "q d"]
    masks: Masks
    axis_name: AxisName | None
    exchange: str
    implementation: str | None

    def swapped(self) -> "Comparison":
        """The same comparison with queries and keys swapped."""
        guides = None if self.masks.guides is None else self.masks.guides[::-1]
        return self._replace(
            queries=self.keys, keys=self.queries, masks=self.masks._replace(guides=guides)
        )

    def reduced(
        self,
        reduce: Callable[..., tuple[Array, Array]],
        directions: tuple[str, ...],
    ) -> dict[str, Float[Array, " q"]]:
        """Apply an operation of `jaxcl.ops.pairs` to in-batch negatives, for each direction."""
        values: dict[str, Float[Array, " q"]] = {}
        guides = self.masks.guides
        query_guide, key_guide = (None, None) if guides is None else guides
        if {"query_to_key", "key_to_query"} & set(directions):
            # One product for both directions. Only anchors have ceilings, since a candidate's
            # margin must not mask pairs of a direction in which it has no loss.
            rows, columns = reduce(
                self.queries,
                self.keys,
                query_labels=self.labels(query_guide, ceiling="query_to_key" in directions),
                key_labels=self.labels(key_guide, ceiling="key_to_query" in directions),
                **self.reduction_options(),
            )
            values |= {"query_to_key": rows, "key_to_query": columns}
        for direction, own, guide in (
            ("query_to_query", self.queries, query_guide),
            ("key_to_key", self.keys, key_guide),
        ):
            if direction in directions:
                values[direction], _ = reduce(
                    own,
                    own,
                    query_labels=self.labels(guide),
                    key_labels=self.labels(guide, ceiling=False),
                    **self.reduction_options(),
                )
        return {direction: values[direction] for direction in directions}

    def ceilings(self) -> Float[Array, " q"] | None:
        """The maximum similarity of each row's allowed negatives; `None` for no limit."""
        masks = self.masks
        ceilings = similarity_ceilings(
            inner_product(*(masks.guides or (self.queries, self.keys))),
            margin=masks.margin,
            relative_margin=masks.relative_margin,
        )
        if ceilings is None and masks.guides is not None:
            raise ValueError("guides need a margin; give margin or relative_margin (0 is allowed)")
        return ceilings

    def reduction_options(self) -> dict[str, Any]:
        """The arguments of all reductions: the exchange between devices, and the implementation."""
        return {
            "axis_name": self.axis_name,
            "exchange": self.exchange,
            "implementation": self.implementation,
        }

    def labels(self, guide: Float[Array, "q g"] | None, *, ceiling: bool = True) -> PairLabels:
        """One side's labels, with the ceilings of its rows if they are anchors."""
        labels = batch_labels(
            self.queries.shape[0],
            ids=self.masks.ids,
            groups=self.masks.groups,
            valid=self.masks.valid,
            axis_name=self.axis_name,
        )
        ceilings = self.ceilings()
        if ceilings is None:
            return labels
        return labels._replace(
            ceiling=ceilings if ceiling else None,
            guide=None if guide is None else lax.stop_gradient(guide),
        )


def checked_batch(
    queries: Float[Array, "..."],
    keys: Float[Array, "..."],
    masks: Masks,
    *,
    directions: tuple[str, ...],
    temperature: float | Array,
) -> tuple[Float[Array, "q d"], Float[Array, "q d"], Masks]:
    """Check the arguments that all losses share.

    Returns:
      Queries, keys and masks as JAX arrays, with labels as int32.

    Raises:
      ValueError: if the shapes of queries and keys differ, a direction is unknown, the temperature
        is not above 0, or a label does not fit in int32.
      TypeError: if queries or keys are not arrays of floats, or labels are not integers.
    """
    queries, keys = as_vectors("queries", queries), as_vectors("keys", keys)
    check_numbers("temperature", temperature, TEMPERATURES)
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
            f"queries have the shape {queries.shape} and keys {keys.shape}; give equal shapes, "
            "with the positive of query i as key i"
        )
    if masks.guides is not None:
        query_guide, key_guide = (as_vectors("masks.guides", guide) for guide in masks.guides)
        masks = masks._replace(guides=(query_guide, key_guide))
    return queries, keys, masks._replace(**label_fields("masks", masks))
