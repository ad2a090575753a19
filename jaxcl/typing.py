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

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
)

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
    "Count",
    "Embeddings",
    "Float",
    "Int",
    "Integer",
    "Key",
    "NotNegative",
    "Num",
    "NumpyInt",
    "Positive",
    "PositiveShare",
    "PyTree",
    "Range",
    "Rate",
    "RowKeys",
    "Scalar",
    "Share",
    "Size",
    "Tokens",
    "UInt8",
    "check_arguments",
    "check_ranges",
]

SIDES = ("query", "key")
"""The two sides of a pair, in their order in arrays and in random keys."""

PADDING_ID = 0
"""The token id that pads a text to the width of its batch. Encoders mask this id, unless the inputs
have a `"length"`: then any id may be a token."""

PyTree: TypeAlias = Any
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""One mesh axis, or several, over which a function runs inside `jax.shard_map`."""

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
step. An augmentation that drops tokens may add a `"mask"`; an image augmentation may change the
size and type of the image."""

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


Count = Annotated[int, Range(least=0)]
Size = Annotated[int, Range(least=1)]
NotNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
Rate = Annotated[float, Range(least=0, below=1)]

F = TypeVar("F", bound=Callable)


def check_ranges(options: tuple[Any, ...]) -> None:
    """Raise a `ValueError` if a field of a NamedTuple is outside the `Range` of its annotation.

    `None` is always allowed. Every number in a tuple must be in the range of the field.
    """
    _check(options._asdict(), type(options))  # type: ignore[attr-defined] # of a NamedTuple


def check_arguments(function: F) -> F:
    """Wrap a function so that it checks the `Range` of each argument, like `check_ranges`.

    For a class, the arguments of its constructor are checked.

    Example:
      >>> @check_arguments
      ... def keep(*, rate: Rate = 0.5) -> float:
      ...     return 1 - rate
      >>> keep(rate=1.5)
      Traceback (most recent call last):
      ValueError: rate=1.5; set it to at least 0, below 1
    """
    if isinstance(function, type):
        function.__init__ = check_arguments(function.__init__)  # type: ignore[misc] # of a class
        return function

    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checking(*arguments: Any, **options: Any) -> Any:
        _check(dict(zip(names, arguments, strict=False)) | options, function)
        return function(*arguments, **options)

    return cast(F, checking)


def _check(values: Mapping[str, Any], declared: Callable) -> None:
    """Check values against the annotations of a function's arguments or a class's fields."""
    hints = get_type_hints(declared, include_extras=True)
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            for allowed in _ranges(hints.get(name)) if number is not None else ():
                allowed.check(name, number)


def _ranges(hint: Any) -> Iterator[Range]:
    if isinstance(hint, Range):
        yield hint
    for part in get_args(hint):
        yield from _ranges(part)
