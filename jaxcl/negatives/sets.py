"""Negatives from outside the batch: shared by all queries, or separate for each query."""

from typing import NamedTuple, TypeAlias

from jaxcl.typing import Array, Bool, Float, Integer

__all__ = ["ExplicitNegatives", "Negatives", "OwnNegatives", "SharedNegatives"]


class SharedNegatives(NamedTuple):
    """Negatives for every query on every device; each device holds a share of them.

    Attributes:
      vectors: the keys; without gradient unless the function that builds them says otherwise.
      ids: ids of the keys; a key with the query's id is masked. `None` if no query shares an id.
      groups: groups of the keys; a key with the query's group is masked.
      valid: `False` for padding.
      guides: the guide model's embeddings of the keys.
    """

    vectors: Float[Array, "n d"]
    ids: Integer[Array, " n"] | None = None
    groups: Integer[Array, " n"] | None = None
    valid: Bool[Array, " n"] | None = None
    guides: Float[Array, "n g"] | None = None


class OwnNegatives(NamedTuple):
    """Separate negatives for each query of this device: nearest in a bank, or synthetic.

    Attributes:
      vectors: the keys of each query.
      ids: ids of the keys; a key with the query's id is masked. `None` if no query shares an id.
      groups: groups of the keys; a key with the query's group is masked.
      valid: `False` for padding of queries with fewer keys.
      guides: the guide model's embeddings of the keys.
    """

    vectors: Float[Array, "q n d"]
    ids: Integer[Array, "q n"] | None = None
    groups: Integer[Array, "q n"] | None = None
    valid: Bool[Array, "q n"] | None = None
    guides: Float[Array, "q n g"] | None = None


class ExplicitNegatives(NamedTuple):
    """Negatives that belong to a row, such as mined negatives, and also serve all other queries.

    A query's own explicit negatives may have more weight. In the direction `"key_to_key"` they are
    also negatives of the other rows' keys.

    Attributes:
      vectors: the keys of each row.
      ids: row numbers of the keys; a key with the query's id is masked.
      groups: groups of the keys; a key with the query's group is masked.
      valid: `False` for padding of rows with fewer keys.
      guides: the guide model's embeddings of the keys.
    """

    vectors: Float[Array, "q n d"]
    ids: Integer[Array, "q n"] | None = None
    groups: Integer[Array, "q n"] | None = None
    valid: Bool[Array, "q n"] | None = None
    guides: Float[Array, "q n g"] | None = None


Negatives: TypeAlias = ExplicitNegatives | OwnNegatives | SharedNegatives
