"""What the losses of a batch share: who is compared with whom."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcl.negatives.masks import batch_labels, similarity_ceilings
from jaxcl.negatives.memory_bank import MemoryBank, read_bank
from jaxcl.ops.pairs import PairLabels, pair_count, pair_logsumexp
from jaxcl.ops.pairs.reductions import LOGSUMEXP
from jaxcl.ops.vectors import inner_product
from jaxcl.typing import Array, AxisName, Bool, Float, Integer

__all__ = ["DIRECTIONS", "Comparison", "Negatives", "check_sides", "own_products"]

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
"""Who looks among whom: in `"query_to_key"`, each query for its key among all keys."""


class Negatives(NamedTuple):
    """Explicit negatives of each row: mined ones, for instance.

    Attributes:
      vectors: some for each row.
      ids: which rows' keys they are.
      groups: their groups.
      valid: `False` where a row has fewer.
      guides: their embeddings by the model that judges similarity.
    """

    vectors: Float[Array, "q n d"]
    ids: Integer[Array, "q n"] | None
    groups: Integer[Array, "q n"] | None
    valid: Bool[Array, "q n"] | None
    guides: Float[Array, "q n g"] | None


class Comparison(NamedTuple):
    """How the rows of a batch are compared: the arguments that all its losses have in common.

    `infonce_loss` explains them.
    """

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
        """The log-sum-exp of each row's negatives by direction, in nats; −∞ without any."""
        reduce = functools.partial(pair_logsumexp, temperature=temperature, hardness=hardness)
        return self._by_direction(reduce, queries, keys, directions)

    def negatives_of_rows(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        *,
        temperature: Float[Array, " q"],
        direction: str,
    ) -> Float[Array, " q"]:
        """The same for one direction, in which each row that looks has a temperature of its own."""
        if direction == "key_to_query":
            # Temperatures go by the rows of a product: here the keys look.
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
        """How many negatives each row has, by direction."""
        return self._by_direction(pair_count, queries, keys, directions)

    def _by_direction(
        self,
        reduce: Callable,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        directions: tuple[str, ...],
    ) -> dict[str, Float[Array, " q"]]:
        found: dict[str, Float[Array, " q"]] = {}
        query_guide, key_guide = (None, None) if self.guides is None else self.guides
        if {"query_to_key", "key_to_query"} & set(directions):
            # One product for both. Who does not look has no say in what is too similar.
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

    def explicit(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        negatives: Negatives,
        *,
        temperature: float | Array,
        directions: tuple[str, ...],
        hardness: float,
        own_hardness: float,
    ) -> dict[str, Float[Array, " q"]]:
        """The log-sum-exp of all rows' explicit negatives, by the directions that see keys."""
        if not {"query_to_key", "key_to_key"} & set(directions):
            raise ValueError(f"negatives are keys, and nobody looks for one in {directions}")
        ceilings = self.ceilings(queries, keys)
        query_guide, key_guide = (None, None) if self.guides is None else self.guides
        found = {
            direction: self.explicit_negatives(
                rows, guide, negatives, ceilings, temperature=temperature, hardness=hardness
            )
            for direction, rows, guide in (
                ("query_to_key", queries, query_guide),
                ("key_to_key", keys, key_guide),
            )
            if direction in directions
        }
        if "query_to_key" in found:  # a key has no negatives of its own
            own = self.own_negatives(
                queries, negatives, ceilings, temperature=temperature, hardness=own_hardness
            )
            found["query_to_key"] = jnp.logaddexp(found["query_to_key"], own)
        return found

    def explicit_negatives(
        self,
        rows: Float[Array, "q d"],
        guide: Float[Array, "q g"] | None,
        negatives: Negatives,
        ceilings: Float[Array, " q"] | None,
        *,
        temperature: float | Array,
        hardness: float = 0.0,
    ) -> Float[Array, " q"]:
        """The log-sum-exp of each row over the explicit negatives of all other rows, in nats."""
        ours, theirs = self._negative_labels(negatives)
        if guide is not None and negatives.guides is not None:
            ours = ours._replace(guide=lax.stop_gradient(guide))
            guides = negatives.guides.reshape(-1, guide.shape[-1])
            theirs = theirs._replace(guide=lax.stop_gradient(guides))
        found, _ = pair_logsumexp(
            rows,
            negatives.vectors.reshape(-1, negatives.vectors.shape[-1]),
            query_labels=ours._replace(ceiling=ceilings),
            key_labels=theirs,
            temperature=temperature,
            hardness=hardness,
            **self.how(),
        )
        return found

    def own_negatives(
        self,
        queries: Float[Array, "q d"],
        negatives: Negatives,
        ceilings: Float[Array, " q"] | None,
        *,
        temperature: float | Array,
        hardness: float = 0.0,
    ) -> Float[Array, " q"]:
        """The log-sum-exp of each query over the explicit negatives of its own row, in nats."""
        similarities = own_products(queries, negatives.vectors)
        constant = lax.stop_gradient(similarities)
        counted = jnp.ones(similarities.shape, bool)
        if negatives.valid is not None:
            counted &= negatives.valid
        for ours, theirs in ((self.ids, negatives.ids), (self.groups, negatives.groups)):
            if ours is not None and theirs is not None:
                counted &= theirs != ours[:, None]
        if ceilings is not None:
            judged = constant
            if self.guides is not None and negatives.guides is not None:
                judged = own_products(self.guides[0], negatives.guides)
            counted &= judged <= ceilings[:, None]
        if self.valid is not None:
            counted &= self.valid[:, None]
        scores = similarities / jnp.reshape(jnp.asarray(temperature), (-1, 1)) + hardness * constant
        return LOGSUMEXP.reduce(jnp.where(counted, scores, -jnp.inf), 1)

    def bank_negatives(
        self,
        queries: Float[Array, "q d"],
        bank: MemoryBank,
        ceilings: Float[Array, " q"] | None,
        *,
        temperature: float | Array,
        hardness: float = 0.0,
    ) -> Float[Array, " q"]:
        """The log-sum-exp of each query over all devices' slots of a bank, in nats.

        The bank stays where it is: its slots are the rows of the product, and the queries, which
        are fewer, visit them.
        """
        if self.ids is None:
            raise ValueError("a bank's slots are compared with ids, the rows' own; give both")
        if self.guides is not None:
            raise ValueError("guides judge the batch; a bank has no guide's embeddings")
        if jnp.ndim(temperature):
            raise ValueError("temperatures by row do not reach a bank; give one for all")
        slots = read_bank(bank)
        ours: tuple[Array, ...] = (self.ids,)
        if self.groups is None:
            slots = slots._replace(different=slots.different[:1])
        else:
            ours = (self.ids, self.groups)
        _, found = pair_logsumexp(
            lax.stop_gradient(bank.vectors).astype(queries.dtype),
            queries,
            query_labels=slots,
            key_labels=PairLabels(different=ours, valid=self.valid, ceiling=ceilings),
            temperature=temperature,
            hardness=hardness,
            **self.how(),
        )
        return found

    def ceilings(
        self, queries: Float[Array, "q d"], keys: Float[Array, "q d"]
    ) -> Float[Array, " q"] | None:
        """The greatest similarity at which a negative of each row counts."""
        ceilings = similarity_ceilings(
            inner_product(*((queries, keys) if self.guides is None else self.guides)),
            margin=self.margin,
            relative_margin=self.relative_margin,
        )
        if ceilings is None and self.guides is not None:
            raise ValueError("guides judge by a margin; give margin or relative_margin (0 will do)")
        return ceilings

    def check_negatives(self, negatives: Negatives, queries: Float[Array, "q d"]) -> None:
        """Raises a `ValueError` for explicit negatives that do not belong to these rows."""
        (rows, width), shape = queries.shape, negatives.vectors.shape
        if shape[0] != rows or shape[2] != width:
            raise ValueError(
                f"negatives have the shape {shape}; wanted are ({rows}, any number, {width})"
            )
        for name, array in (
            ("negative_ids", negatives.ids),
            ("negative_groups", negatives.groups),
            ("negatives_valid", negatives.valid),
            ("negative_guides", negatives.guides),
        ):
            if array is not None and array.shape[:2] != shape[:2]:
                raise ValueError(f"{name} have the shape {array.shape}, not {shape[:2]}")
        if (negatives.guides is None) != (self.guides is None):
            raise ValueError("guides judge explicit negatives by negative_guides; give both")
        if negatives.ids is not None and self.ids is None:
            raise ValueError("negative_ids are compared with ids, the rows' own; give both")
        if negatives.groups is not None and self.groups is None:
            raise ValueError("negative_groups are compared with groups, the rows'; give both")

    def _negative_labels(self, negatives: Negatives) -> tuple[PairLabels, PairLabels]:
        """Labels of rows and of all explicit negatives, of which a row's own do not count here."""
        num_rows, width = negatives.vectors.shape[:2]
        (place,) = batch_labels(num_rows, axis_name=self.axis_name).different
        ours: tuple[Array, ...] = (place,)
        theirs: tuple[Array, ...] = (jnp.repeat(place, width),)
        for own, others in ((self.ids, negatives.ids), (self.groups, negatives.groups)):
            if own is not None and others is not None:
                ours, theirs = (*ours, own), (*theirs, others.ravel())
        valid = jnp.ones((num_rows, width), bool) if negatives.valid is None else negatives.valid
        if self.valid is not None:
            valid &= self.valid[:, None]
        return (
            PairLabels(different=ours, valid=self.valid),
            PairLabels(different=theirs, valid=valid.ravel()),
        )

    def how(self) -> dict[str, Any]:
        """What every reduction of this comparison is told."""
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
        """One side's labels, with the ceilings of its rows if it looks."""
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
    """Each row's inner products with vectors of its own, summed in float32 at least."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.einsum("qd,qnd->qn", rows, vectors, preferred_element_type=wide)


def check_sides(
    queries: Float[Array, "..."], keys: Float[Array, "..."], directions: tuple[str, ...]
) -> None:
    """Raises a `ValueError` for sides that do not belong together, or an unknown direction."""
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
