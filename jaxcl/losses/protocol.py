"""The type of a loss: the arguments that all losses share, and the declaration of others."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxcl.negatives.sets import ExplicitNegatives, Negatives, OwnNegatives, SharedNegatives
from jaxcl.typing import Array, AxisName, Bool, Float, Integer, PyTree

__all__ = ["EVERY_KIND", "NO_MASKS", "Loss", "LossFn", "Masks", "NegativesByName", "NoOptions"]

NegativesByName: TypeAlias = Mapping[str, Negatives]
"""Negatives from outside the batch by name: `"explicit"`, or the name of a tier."""

EVERY_KIND = (ExplicitNegatives, OwnNegatives, SharedNegatives)
"""The kinds of negatives from outside the batch."""


class Masks(NamedTuple):
    """Which pairs of rows are not negatives, since they may be positives or padding.

    Attributes:
      ids: row numbers. Two rows with the same id are never negatives of each other, so a batch may
        contain a row twice.
      groups: labels. Two rows of the same group are never negatives of each other.
      valid: `False` for padding, which is no row's negative and has a loss of 0.
      margin: a negative counts only if it is less similar than the row's own positive by at least
        this difference. The positive is that of the row for which the loss is computed.
      relative_margin: the same as a share of the positive's similarity.
      guides: embeddings of both sides by a guide model, whose similarities decide on the margins
        instead of the model's own.
    """

    ids: Integer[Array, " q"] | None = None
    groups: Integer[Array, " q"] | None = None
    valid: Bool[Array, " q"] | None = None
    margin: float | None = None
    relative_margin: float | None = None
    guides: tuple[Float[Array, "q g"], Float[Array, "q g"]] | None = None


NO_MASKS = Masks()


class NoOptions(NamedTuple):
    """The options of a loss that has none."""


@runtime_checkable
class LossFn(Protocol):
    r"""`(queries, keys, *, temperature, masks, negatives, …) -> the loss of each row, in nats`.

    A loss must satisfy the following; `tests/losses/test_battery.py` checks it for all of `LOSSES`.

    - It returns one value per row of this device, in float32 or wider. The caller takes the mean,
      and differentiates outside of the `shard_map`.
    - Row `i` of the queries belongs to row `i` of the keys, and the order of rows does not matter.
    - Rows that are not valid have the value 0, and change no other row's value or gradient.
      The result is finite, with a finite gradient, for a batch without valid rows or negatives.
    - A pair that is excluded by a mask that the loss heeds counts no more than if the other row
      were not there.
    - With `axis_name` the rows of all devices are compared: values and gradients are the same as on
      one device that holds all rows, whatever the exchange and the implementation.
    - Gradients reach both sides and the temperature, which may be an array.

    A loss is compiled into the train step, so it is pure, and its shapes are static. One that
    takes more than these arguments, or fewer, declares that in a `Loss`.

    Args:
      queries: this device's queries, unit vectors in general.
      keys: their keys.
      temperature: $\tau > 0$; it may be learned.
      masks: which pairs are not negatives.
      negatives: negatives from outside the batch, by name.
      axis_name: the mesh axis or axes of an enclosing `jax.shard_map` over which rows are sharded.
      exchange: how devices exchange their rows: `"gather"` or `"ring"`
        (`jaxcl.ops.pairs.pair_logsumexp`).
      implementation: an implementation of `jaxcl.ops.pairs`; `None` for the best that runs here.
    """

    def __call__(
        self,
        queries: Float[Array, "q d"],
        keys: Float[Array, "q d"],
        *,
        temperature: float | Float[Array, ""],
        masks: Masks = NO_MASKS,
        negatives: NegativesByName | None = None,
        axis_name: AxisName | None = None,
        exchange: str = "gather",
        implementation: str | None = None,
    ) -> Float[Array, " q"]: ...


class Loss(NamedTuple):
    """A loss function, and the arguments in which it differs from `LossFn`.

    Attributes:
      function: the loss.
      options: a NamedTuple class of its options, each `None` for the function's own default, with
        the range of each number (`jaxcl.typing.Range`). `None` if nothing is declared: then any
        option is passed on.
      masks: the fields of `Masks` that it heeds; `()` for a function without the argument `masks`.
      negatives: the kinds of negatives from outside the batch that it takes; `()` for a function
        without the argument `negatives`.
      columns: arguments that are columns of a batch: argument -> column, such as
        `{"teacher_scores": "teacher_scores"}`.
      has_bias: whether it takes a `bias`, which may be learned.
      exchanges: whether it compares rows of different devices; if not, it takes no `axis_name`,
        `exchange` and `implementation`.
      init_memory: `(number of training rows, *, temperature, **options) -> tables` with an entry
        for each training row. The function then takes `memory`, the entries of its rows, and
        returns `(loss, memory)`.
      bounds_temperature: whether it takes `temperature_bounds`, as it learns temperatures itself.
    """

    function: Callable[..., Any]
    options: type | None = None
    masks: tuple[str, ...] = Masks._fields
    negatives: tuple[type, ...] = EVERY_KIND
    columns: Mapping[str, str] = {}
    has_bias: bool = False
    exchanges: bool = True
    init_memory: Callable[..., PyTree] | None = None
    bounds_temperature: bool = False
