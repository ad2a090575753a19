"""The parts that a config names: losses, encoders, optimizers and schedules, with their options.

A name is a key of a registry, or `package.module:function`, which is imported. The registries of
losses and encoders are `jaxcl.losses.LOSSES` and `jaxcl.models.ENCODERS`.
"""

import functools
import importlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import (
    Any,
    NamedTuple,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.losses import Loss
from jaxcl.models import EncoderPart
from jaxcl.models.augmentations import Augmentation
from jaxcl.settings.section_reader import did_you_mean, read_section

__all__ = [
    "SCHEDULES",
    "SCHEDULE_FIELDS",
    "Part",
    "Trust",
    "find_part",
    "given_options",
    "is_function_name",
    "option_fields",
]

Trust: TypeAlias = Collection[str] | None
"""The packages from which `package.module:function` is imported; `None` for all."""


class Part(NamedTuple):
    """A function that a config may name.

    Attributes:
      function: the function or class.
      options: a NamedTuple class that declares the function's options, in which `None` stands for
        the function's own default. If `options` is `None`, every option is passed on.
    """

    function: Callable
    options: type | None = None


AnyPart: TypeAlias = Part | Loss | EncoderPart | Augmentation
P = TypeVar("P", Part, Loss, EncoderPart, Augmentation)


def _warmup_cosine(
    peak: float, *, warmup_steps: int, steps: int, final_rate: float = 0.0
) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=min(warmup_steps, steps - 1),
        decay_steps=steps,
        end_value=final_rate * peak,
    )


def _warmup_linear(
    peak: float, *, warmup_steps: int, steps: int, final_rate: float = 0.0
) -> optax.Schedule:
    warmup_steps = min(warmup_steps, steps - 1)
    return _warmup_stable_decay(
        peak,
        warmup_steps=warmup_steps,
        steps=steps,
        decay_steps=steps - warmup_steps,
        final_rate=final_rate,
    )


def _warmup_constant(peak: float, *, warmup_steps: int, steps: int) -> optax.Schedule:
    del steps  # so that a finished run can be extended
    if not warmup_steps:  # optax would never leave the initial rate of 0
        return optax.constant_schedule(peak)
    return optax.schedules.warmup_constant_schedule(0.0, peak, warmup_steps)


def _warmup_stable_decay(
    peak: float, *, warmup_steps: int, steps: int, decay_steps: int, final_rate: float = 0.0
) -> optax.Schedule:
    decay_steps = min(decay_steps, steps)
    rise = _warmup_constant(peak, warmup_steps=min(warmup_steps, steps - decay_steps), steps=steps)
    if not decay_steps:
        return rise
    fall = optax.linear_schedule(peak, final_rate * peak, decay_steps)
    return optax.join_schedules([rise, fall], [steps - decay_steps])


def _cosine(peak: float, *, steps: int, final_rate: float = 0.0) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, alpha=final_rate)


def _linear(peak: float, *, steps: int, final_rate: float = 0.0) -> optax.Schedule:
    return optax.linear_schedule(peak, final_rate * peak, steps)


def _constant(peak: float, *, steps: int) -> optax.Schedule:
    del steps
    return optax.constant_schedule(peak)


SCHEDULES: Mapping[str, Part] = {
    "warmup_cosine": Part(_warmup_cosine),
    "warmup_linear": Part(_warmup_linear),
    "warmup_constant": Part(_warmup_constant),
    "warmup_stable_decay": Part(_warmup_stable_decay),
    "cosine": Part(_cosine),
    "linear": Part(_linear),
    "constant": Part(_constant),
}
"""Schedules by `config.optimizer.schedule`: `(peak, *, steps, …) -> optax.Schedule`, with the
fields that `SCHEDULE_FIELDS` names. A run with a constant rate can be extended by more `steps`, and
one with `"warmup_stable_decay"` until its rate begins to fall."""

SCHEDULE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "warmup_cosine": ("warmup_steps", "final_rate"),
    "warmup_linear": ("warmup_steps", "final_rate"),
    "warmup_constant": ("warmup_steps",),
    "warmup_stable_decay": ("warmup_steps", "decay_steps", "final_rate"),
    "cosine": ("final_rate",),
    "linear": ("final_rate",),
    "constant": (),
}
"""The fields of `config.optimizer` that each schedule reads. A schedule that is named as
`package.module:function` takes `warmup_steps`."""


def option_fields(registry: Mapping[str, AnyPart]) -> ConfigDict:
    """The options of all members of a registry, unset and typed, for a config's `options`.

    With them, `--config.loss.options.NAME=VALUE` works for every loss.
    """
    fields = ConfigDict()
    for part in registry.values():
        for name, hint in get_type_hints(part.options or object).items():
            (kind,) = set(get_args(hint)) - {type(None)}  # each hint is `kind | None`
            fields[name] = placeholder(get_origin(kind) or kind)
    return fields


def find_part(
    setting: str, name: str, registry: Mapping[str, P], *, kind: type[P], trust: Trust
) -> P:
    """Find a part by name.

    Args:
      setting: the name of the setting, such as `"loss.name"`, for messages.
      name: a member of the registry, or `package.module:function`.
      registry: the known parts.
      kind: the class that declares such a part: `Loss`, `EncoderPart`, `Augmentation`, or `Part`
        for all others. `package.module:name` may name an instance of this class, or a function.
      trust: the packages that may be imported.

    Raises:
      ValueError: for an unknown name, or one that cannot be imported.
      PermissionError: for a package that is not trusted.
    """
    if name in registry:
        return registry[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"{setting}={name!r} is unknown{did_you_mean(name, registry)}; use one of "
            f"{', '.join(registry)}, or package.module:function"
        )
    package = module.partition(".")[0]
    if trust is not None and package not in trust:
        raise PermissionError(
            f"{setting}={name!r} would run code of the package {package!r}; add --trust {package} "
            "if you trust it"
        )
    try:
        function = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{setting}={name!r} cannot be imported: {error}") from error
    if isinstance(function, kind):
        return function
    if not callable(function):
        raise ValueError(f"{setting}={name!r} is not a function")
    return kind(function)


def is_function_name(name: str | None) -> bool:
    """Whether a name is `package.module:function`, and not `data_set:1.0.0`.

    Example:
      >>> is_function_name("my_pairs:1.0.0"), is_function_name("my_package.data:open_split")
      (False, True)
    """
    return name is not None and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def given_options(section: str, name: str, part: AnyPart, options: Mapping[str, Any]) -> dict:
    """The options that are set, checked against the part's declaration.

    Args:
      section: `"loss"`, `"model"` or `"optimizer"`, for messages.
      name: the part's name.
      part: the part that declares the options.
      options: values by name; `None` means the part's own default.

    Raises:
      ValueError: for an option that the part does not have, or a value outside its range.
    """
    values = {option: value for option, value in options.items() if value is not None}
    if part.options is None:
        return values
    known = part.options._fields  # type: ignore[attr-defined] # a NamedTuple's
    for option in values:
        if option not in known:
            raise ValueError(
                f"{section}.options.{option} is unknown to {name!r}{did_you_mean(option, known)}; "
                f"it has {', '.join(known)}"
            )
    checked: Any = read_section(part.options, values, path=f"{section}.options")
    return {option: getattr(checked, option) for option in values}
