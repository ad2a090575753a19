"""Negatives from outside the batch: shared by all queries, or separate for each query."""

from typing import NamedTuple, TypeAlias

from jaxcl.typing import Array, Bool, Float, Integer

__all__ = ["ExplicitNegatives", "Negatives", "OwnNegatives", "SharedNegatives"]


class SharedNegatives(NamedTuple):
    """Keys that are negatives of every query on every device; this device holds its share.

    Attributes:
      vectors: the keys; without gradient unless the function that builds them says otherwise.
      ids: ids, from which a query's own id must differ; `None` if no query shares one.
      groups: groups, from which a query's own group must differ.
      valid: `False` for padding.
      guides: their guide embeddings.
    """

    vectors: Float[Array, "n d"]
    ids: Integer[Array, " n"] | None = None
    groups: Integer[Array, " n"] | None = None
    valid: Bool[Array, " n"] | None = None
    guides: Float[Array, "n g"] | None = None


class OwnNegatives(NamedTuple):
    """Separate keys for each query of this device: nearest in a bank, or synthetic.

    Attributes:
      vectors: the keys of each query.
      ids: ids, from which the query's own id must differ; `None` if no query shares one.
      groups: groups, from which the query's own group must differ.
      valid: `False` where a query has fewer.
      guides: their guide embeddings.
    """

    vectors: Float[Array, "q n d"]
    ids: Integer[Array, "q n"] | None = None
    groups: Integer[Array, "q n"] | None = None
    valid: Bool[Array, "q n"] | None = None
    guides: Float[Array, "q n g"] | None = None


class ExplicitNegatives(NamedTuple):
    """Keys that come with each row, such as mined negatives, and serve all queries of all devices.

    A query's own may be given more weight. In the direction `"key_to_key"` they are also negatives
    of the other rows' keys.

    Attributes:
      vectors: the keys of each row.
      ids: the row number of each, from which a query's own id must differ.
      groups: groups, from which a query's own group must differ.
      valid: `False` where a row has fewer.
      guides: their guide embeddings.
    """

    vectors: Float[Array, "q n d"]
    ids: Integer[Array, "q n"] | None = None
    groups: Integer[Array, "q n"] | None = None
    valid: Bool[Array, "q n"] | None = None
    guides: Float[Array, "q n g"] | None = None


Negatives: TypeAlias = ExplicitNegatives | OwnNegatives | SharedNegatives
