"""The interface of losses: the arguments that all share, and declarations of additional ones."""

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
    """Pairs of rows that are not negatives, since they may be positives or padding.

    Attributes:
      ids: row numbers. Rows with the same id are never each other's negatives, so a batch may
        contain a row twice.
      groups: labels. Rows of the same group are never each other's negatives.
      valid: `False` for padding, which is never a negative and has a loss of 0.
      margin: negatives are masked if their similarity to the anchor exceeds the positive's
        similarity minus this margin.
      relative_margin: like `margin`, but as a fraction of the positive's similarity.
      guides: a guide model's embeddings of queries and keys, whose similarities replace the model's
        in the margins.
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

    Every loss must satisfy the following; `tests/losses/test_battery.py` checks all of `LOSSES`.

    - It returns one value per row of this device, in float32 or wider. The caller takes the mean,
      and differentiates outside the `shard_map`. A loss that is not a mean over rows returns the
      value of the whole batch for each valid row.
    - Key `i` is the positive of query `i`, and the order of rows does not matter.
    - Invalid rows have the value 0, and do not change the values or gradients of other rows. The
      result is finite, with a finite gradient, for a batch without valid rows or negatives.
    - A masked pair affects the loss no more than if the other row were missing, for each mask that
      the loss supports.
    - With `axis_name`, values and gradients are the same as on one device that holds the rows of
      all devices, whatever the exchange and the implementation.
    - Gradients reach both sides and, if the loss has one, the temperature, which may be an array.

    A loss is compiled into the train step, so it is pure and has static shapes. A loss that takes
    more or fewer arguments declares them in a `Loss`.

    Args:
      queries: this device's queries, usually unit vectors.
      keys: the queries' keys.
      temperature: $\tau > 0$; it may be learned.
      masks: pairs that are not negatives.
      negatives: negatives from outside the batch, by name.
      axis_name: the mesh axis or axes of an enclosing `jax.shard_map` over which rows are sharded.
      exchange: how devices exchange their rows: `"gather"` or `"ring"`
        (`jaxcl.ops.pairs.pair_logsumexp`).
      implementation: an implementation of `jaxcl.ops.pairs`; `None` chooses one by size.
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
    """A loss function, and how its arguments differ from the arguments of `LossFn`.

    Attributes:
      function: the loss.
      options: a NamedTuple class of its options, each `None` for the function's default, with the
        range of each number (`jaxcl.typing.Range`). If `None`, any option is passed on.
      masks: the fields of `Masks` that the loss supports; `()` for a function without a `masks`
        argument.
      negatives: the kinds of negatives from outside the batch that the loss supports; `()` for a
        function without a `negatives` argument.
      columns: arguments that are columns of a batch: argument -> column, such as
        `{"teacher_scores": "teacher_scores"}`.
      has_temperature: whether the loss takes a `temperature`, which may be learned.
      has_bias: whether the loss takes a `bias`, which may be learned.
      exchanges: whether the loss compares rows of different devices; if not, it takes no
        `axis_name`, `exchange` or `implementation`.
      multiplies: whether the loss multiplies queries by the keys of other rows; if not, it takes no
        `exchange` or `implementation`.
      init_memory: `(number of training rows, *, temperature, **options) -> tables` with one entry
        per training row. The function then takes `memory`, the entries of the batch's rows, and
        returns `(loss, memory)`.
      bounds_temperature: whether the loss takes `temperature_bounds` and updates temperatures.
    """

    function: Callable[..., Any]
    options: type | None = None
    masks: tuple[str, ...] = Masks._fields
    negatives: tuple[type, ...] = EVERY_KIND
    columns: Mapping[str, str] = {}
    has_temperature: bool = True
    has_bias: bool = False
    exchanges: bool = True
    multiplies: bool = True
    init_memory: Callable[..., PyTree] | None = None
    bounds_temperature: bool = False
