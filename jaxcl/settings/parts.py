"""The parts that a config names: losses, encoders, optimizers and schedules, with their options.

A name is one of the registries below, or `package.module:function`, which is imported.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args, get_origin, get_type_hints

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.losses import (
    decoupled_infonce_loss,
    distillation_loss,
    hard_infonce_loss,
    infonce_loss,
    sigmoid_pair_loss,
    supervised_infonce_loss,
)
from jaxcl.losses.running_estimate import estimate_memory, remembered_estimate_loss
from jaxcl.models import DecoderEncoder, StaticEncoder, TransformerEncoder
from jaxcl.settings.ranges import Range, did_you_mean, read_section
from jaxcl.typing import PyTree

__all__ = [
    "ENCODERS",
    "LOSSES",
    "MEMORIES",
    "OPTIMIZERS",
    "SCHEDULES",
    "Part",
    "Trust",
    "arguments_of",
    "find_part",
    "given_options",
    "is_function_name",
    "option_fields",
]

Trust: TypeAlias = Collection[str] | None
"""The packages from which `package.module:function` is imported; `None` for all."""

_Size = Annotated[int, Range(least=1)]
_Rate = Annotated[float, Range(least=0, below=1)]
_NotNegative = Annotated[float, Range(least=0)]
_Positive = Annotated[float, Range(above=0)]
_Number = Annotated[float, Range()]


class Part(NamedTuple):
    """A function that a config may name.

    Attributes:
      function: the function or class.
      options: a NamedTuple class that declares its options, each `None` for the function's own
        default; `None` where nothing is declared, and any option is passed on.
    """

    function: Callable
    options: type | None


class InfonceOptions(NamedTuple):
    """Options of `infonce_loss`."""

    directions: tuple[str, ...] | None = None
    partition: str | None = None
    hardness: _NotNegative | None = None
    negative_hardness: _NotNegative | None = None


class DirectionOptions(NamedTuple):
    """Options of losses that only choose their directions."""

    directions: tuple[str, ...] | None = None


class HardOptions(NamedTuple):
    """Options of `hard_infonce_loss`."""

    concentration: _NotNegative | None = None
    positive_share: _Rate | None = None
    directions: tuple[str, ...] | None = None


class SigmoidOptions(NamedTuple):
    """Options of `sigmoid_pair_loss`."""

    bias: _Number | None = None


class DistillationOptions(NamedTuple):
    """Options of `distillation_loss`."""

    teacher_temperature: _Positive | None = None


class EstimateOptions(NamedTuple):
    """Options of `remembered_estimate_loss`."""

    update_rate: Annotated[float, Range(above=0, most=1)] | None = None
    robustness: _Number | None = None
    epsilon: _Positive | None = None
    directions: tuple[str, ...] | None = None
    temperature_rate: _Positive | None = None


class StaticOptions(NamedTuple):
    """Options of `StaticEncoder`."""

    max_tokens: _Size | None = None
    hidden_dim: _Size | None = None
    token_dropout: _Rate | None = None


class TransformerOptions(NamedTuple):
    """Options of `TransformerEncoder`."""

    max_tokens: _Size | None = None
    hidden_dim: _Size | None = None
    num_layers: _Size | None = None
    num_heads: _Size | None = None
    mlp_dim: _Size | None = None
    norm_position: str | None = None
    pooling: str | None = None
    dropout: _Rate | None = None
    attention: str | None = None
    remat: bool | None = None
    scan_layers: bool | None = None
    compute_dtype: str | None = None


class DecoderOptions(NamedTuple):
    """Options of `DecoderEncoder`."""

    max_tokens: _Size | None = None
    hidden_dim: _Size | None = None
    num_layers: _Size | None = None
    num_heads: _Size | None = None
    num_key_heads: _Size | None = None
    mlp_dim: _Size | None = None
    rotary_base: _Positive | None = None
    dropout: _Rate | None = None
    remat: bool | None = None
    compute_dtype: str | None = None


class AdamOptions(NamedTuple):
    """Options of `optax.scale_by_adam`."""

    b1: _Rate | None = None
    b2: _Rate | None = None
    eps: _NotNegative | None = None
    eps_root: _NotNegative | None = None
    mu_dtype: str | None = None
    nesterov: bool | None = None


class LionOptions(NamedTuple):
    """Options of `optax.scale_by_lion`."""

    b1: _Rate | None = None
    b2: _Rate | None = None
    mu_dtype: str | None = None


class SgdOptions(NamedTuple):
    """Options of stochastic gradient descent: the decay of its momentum."""

    decay: _Rate | None = None
    nesterov: bool | None = None


LOSSES: Mapping[str, Part] = {
    "decoupled": Part(decoupled_infonce_loss, DirectionOptions),
    "distillation": Part(distillation_loss, DistillationOptions),
    "hard": Part(hard_infonce_loss, HardOptions),
    "infonce": Part(infonce_loss, InfonceOptions),
    "running_estimate": Part(remembered_estimate_loss, EstimateOptions),
    "sigmoid": Part(sigmoid_pair_loss, SigmoidOptions),
    "supervised": Part(supervised_infonce_loss, DirectionOptions),
}
"""Losses by `config.loss.name`."""

MEMORIES: Mapping[Callable, Callable[..., PyTree]] = {remembered_estimate_loss: estimate_memory}
"""What a loss remembers of each training row, from their number and the loss's options."""

ENCODERS: Mapping[str, Part] = {
    "decoder": Part(DecoderEncoder, DecoderOptions),
    "static": Part(StaticEncoder, StaticOptions),
    "transformer": Part(TransformerEncoder, TransformerOptions),
}
"""Encoders by `config.model.name`."""

OPTIMIZERS: Mapping[str, Part] = {
    "adam": Part(optax.scale_by_adam, AdamOptions),
    "lion": Part(optax.scale_by_lion, LionOptions),
    "sgd": Part(
        lambda decay=0.9, nesterov=False: optax.trace(decay, nesterov),
        SgdOptions,
    ),
}
"""Gradient transformations by `config.optimizer.name`; clipping, weight decay and the learning rate
are added around them."""


def _warmup_cosine(peak: float, *, warmup_steps: int, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=min(warmup_steps, steps - 1),
        decay_steps=steps,
    )


SCHEDULES: Mapping[str, Part] = {"warmup_cosine": Part(_warmup_cosine, None)}
"""Schedules by `config.optimizer.schedule`: `(peak, *, warmup_steps, steps) -> optax.Schedule`.
`"warmup_cosine"` rises linearly and falls to zero along a cosine."""


def option_fields(registry: Mapping[str, Part]) -> ConfigDict:
    """The options of all members of a registry, unset and typed, for a config's `options`.

    So `--config.loss.options.NAME=VALUE` works for whichever loss is named.
    """
    fields = ConfigDict()
    for part in registry.values():
        for name, hint in get_type_hints(part.options or object).items():
            (kind,) = set(get_args(hint)) - {type(None)}  # each is a kind or None
            fields[name] = placeholder(get_origin(kind) or kind)
    return fields


def find_part(setting: str, name: str, registry: Mapping[str, Part], *, trust: Trust) -> Part:
    """The part of a name.

    Args:
      setting: what is being set, such as `"loss.name"`, for messages.
      name: a member of the registry, or `package.module:function`.
      registry: the known parts.
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
    if not callable(function):
        raise ValueError(f"{setting}={name!r} is not a function")
    return Part(function, None)


def is_function_name(name: str | None) -> bool:
    """Whether a name is `package.module:function`, and not `data_set:1.0.0`.

    Example:
      >>> is_function_name("my_pairs:1.0.0"), is_function_name("my_package.data:open_split")
      (False, True)
    """
    return name is not None and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def given_options(section: str, name: str, part: Part, options: Mapping[str, Any]) -> dict:
    """The options that are set, checked against what the part declares.

    Args:
      section: `"loss"`, `"model"` or `"optimizer"`, for messages.
      name: the part's name.
      part: what declares them.
      options: by name; `None` means the part's own default.

    Raises:
      ValueError: for an option that the part does not have, or a value outside its range.
    """
    given = {option: value for option, value in options.items() if value is not None}
    if part.options is None:
        return given
    known = part.options._fields  # type: ignore[attr-defined] # a NamedTuple's
    for option in given:
        if option not in known:
            raise ValueError(
                f"{section}.options.{option} is unknown to {name!r}{did_you_mean(option, known)}; "
                f"it has {', '.join(known)}"
            )
    checked: Any = read_section(part.options, given, path=f"{section}.options")
    return {option: getattr(checked, option) for option in given}


def arguments_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a function or class that can be given by name."""
    # Flax's metaclass hides the signature of a module's constructor.
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_KEYWORD)
    }
