"""The axis letters, array aliases and ranges that the annotations of jaxcl use.

The letters, one meaning each, everywhere:

| letter | axis |
|---|---|
| `q` | queries |
| `k` | keys |
| `d` | features of an embedding |
| `b` | rows of a global batch |
| `n` | rows of a data set, or keys of a search pool |
| `t` | tokens of a text |
| `h` | hidden features inside a model |
| `m` | slots of a memory bank |
| `c` | chunks of a gradient cache |

The two sides of a pair are its *query* and its *key*: documents, passages, code, captions and
second views are keys.
"""

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeAlias, get_args, get_type_hints

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Num, UInt8

__all__ = [
    "PADDING_ID",
    "SIDES",
    "Array",
    "Augment",
    "AxisName",
    "Batch",
    "Bool",
    "Embeddings",
    "Float",
    "Int",
    "Integer",
    "Key",
    "Num",
    "NumpyInt",
    "PyTree",
    "Range",
    "RowKeys",
    "Scalar",
    "Tokens",
    "UInt8",
    "check_ranges",
]

SIDES = ("query", "key")
"""The two sides of a pair, in the order in which arrays and random keys take them."""

PADDING_ID = 0
"""The token id that pads a text to the width of its batch. Encoders mask this id, unless the inputs
have a `"length"`: then any id may be a token."""

PyTree: TypeAlias = Any
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""One mesh axis, or several, under which a function runs inside `jax.shard_map`."""

Batch: TypeAlias = dict[str, PyTree]
"""`{"query": tree, "key": tree, "row": int32[b], "group": int32[b]}`. An encoder turns the tree of
a side into embeddings `[b, d]`, so that the same program trains on text pairs, two views of an
image, or images and captions."""

Embeddings: TypeAlias = Float[Array, "b d"]
Tokens: TypeAlias = Int[Array, "b t"]
Scalar: TypeAlias = Float[Array, ""]
RowKeys: TypeAlias = Key[Array, " b"]
"""One random key per row, so that the random draws depend on neither chunking nor device count."""

Augment: TypeAlias = Callable[[PyTree, Key[Array, ""]], PyTree]
"""`(the input of one row, a random key) -> an input that the encoder reads`, compiled into the
step. An augmentation that drops tokens may add a `"mask"`; one of images may change their size and
type."""

NumpyInt: TypeAlias = Int[np.ndarray, "..."]


_INT32_END = 2**31
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Range(NamedTuple):
    """The values that a number may have.

    NaN is never allowed. Infinity is allowed only without an upper bound and if `finite` is false.
    Without an upper bound, a finite number must fit JAX's type for it, int32 or float32.

    Attributes:
      least: the smallest value allowed.
      above: the value must be greater than this.
      most: the largest value allowed.
      below: the value must be less than this.
      finite: whether infinity is excluded.
    """

    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    below: int | float | None = None
    finite: bool = True

    def check(self, name: str, value: int | float) -> None:
        """Raise a `ValueError` that names the setting if the value is outside the range."""
        inside = (
            not math.isnan(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not self.finite or math.isfinite(value))
        )
        if not inside:
            raise ValueError(f"{name}={value}; set it {self}")
        limit = _INT32_END - 1 if isinstance(value, int) else _FLOAT32_MAX
        if self.most is None and self.below is None and limit < abs(value) < math.inf:
            raise ValueError(f"{name}={value} is too large; set it to at most {limit}")

    def __str__(self) -> str:
        words = {"to at least": self.least, "above": self.above}
        words |= {"at most": self.most, "below": self.below}
        bounds = [f"{word} {bound}" for word, bound in words.items() if bound is not None]
        return ", ".join(bounds) or "to a finite number"


def check_ranges(options: tuple[Any, ...]) -> None:
    """Raise a `ValueError` if a field of a NamedTuple is outside the `Range` of its annotation.

    `None` is always allowed. All numbers of a tuple must be in the same range.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            for allowed in _ranges(hint) if number is not None else ():
                allowed.check(name, number)


def _ranges(hint: Any) -> Iterator[Range]:
    if isinstance(hint, Range):
        yield hint
    for part in get_args(hint):
        yield from _ranges(part)
