"""Keys that stand against queries without being any row's of the batch."""

from typing import NamedTuple

from jaxcl.typing import Array, Bool, Float, Integer

__all__ = ["OwnNegatives", "SharedNegatives"]


class SharedNegatives(NamedTuple):
    """Keys that every query of every device meets; this device holds its share of them.

    Attributes:
      vectors: the keys; constants of the gradient unless their maker says otherwise.
      ids: what a query's own id must differ from; `None` where nobody shares one.
      groups: what its group must differ from.
      valid: `False` where there is none.
      guides: their embeddings by the model that judges similarity.
    """

    vectors: Float[Array, "n d"]
    ids: Integer[Array, " n"] | None = None
    groups: Integer[Array, " n"] | None = None
    valid: Bool[Array, " n"] | None = None
    guides: Float[Array, "n g"] | None = None


class OwnNegatives(NamedTuple):
    """Keys of each query of this device: mined ones, the nearest of a bank, mixtures of those.

    Attributes:
      vectors: some for each query.
      ids: what the query's own id must differ from; `None` where nobody shares one.
      groups: what its group must differ from.
      valid: `False` where a query has fewer.
      guides: their embeddings by the model that judges similarity.
    """

    vectors: Float[Array, "q n d"]
    ids: Integer[Array, "q n"] | None = None
    groups: Integer[Array, "q n"] | None = None
    valid: Bool[Array, "q n"] | None = None
    guides: Float[Array, "q n g"] | None = None
