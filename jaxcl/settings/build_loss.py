"""From a config to the loss of a batch: losses, masks and gradient caches by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.grad_cache import rows_per_chunk
from jaxcl.losses import (
    decoupled_infonce_loss,
    distillation_loss,
    hard_infonce_loss,
    infonce_loss,
    matryoshka,
    sigmoid_pair_loss,
    supervised_infonce_loss,
)
from jaxcl.losses.negative_metrics import measure_negatives
from jaxcl.losses.running_estimate import estimate_memory, remembered_estimate_loss
from jaxcl.models.towers import Towers
from jaxcl.settings.build_assignment import assignment_memory
from jaxcl.settings.build_negatives import build_beyond, mining_rule, negatives_memory
from jaxcl.settings.options import arguments_of, bind_options
from jaxcl.step.batch_loss import LossOfBatch, MeasureOfBatch, make_loss, make_measure
from jaxcl.step.train_step import TemperatureBounds
from jaxcl.typing import SIDES, Integer, PyTree

__all__ = [
    "LOSSES",
    "MASKS",
    "MEMORIES",
    "batch_needs",
    "build_loss",
    "build_measure",
    "build_memory",
]

LOSSES: Mapping[str, Callable] = {
    "decoupled": decoupled_infonce_loss,
    "distillation": distillation_loss,
    "hard": hard_infonce_loss,
    "infonce": infonce_loss,
    "running_estimate": remembered_estimate_loss,
    "sigmoid": sigmoid_pair_loss,
    "supervised": supervised_infonce_loss,
}
"""Losses by name; `config.loss.options` are their keyword arguments."""

MEMORIES: Mapping[str, Callable[..., PyTree]] = {"running_estimate": estimate_memory}
"""What a loss of this name remembers of the training rows, from their number and its options."""

MASKS: Mapping[str, str] = {"row": "ids", "text": "ids", "group": "groups"}
"""Columns of the batch whose equals are no negatives -> the argument of a loss that takes them.
A row is of its own text, so that `"text"` says what `"row"` would."""

_BATCH_ARGUMENTS = (
    *("queries", "keys", "temperature", "axis_name", "valid", "guides", *MASKS.values()),
    *("negatives", "negative_ids", "negative_groups", "negatives_valid", "negative_guides"),
    *("tiers", "key_groups", "teacher_scores", "memory"),
)
_CONFIG_ARGUMENTS = (
    *("exchange", "implementation", "margin", "relative_margin", "temperature_bounds"),
)


def build_loss(config: ConfigDict, towers: Towers, mesh: Mesh) -> LossOfBatch:
    """The loss of `config.loss`, encoded as `config.grad_cache` says: see `make_loss`."""
    loss_fn = _loss_fn(config.loss)
    return make_loss(
        towers.encode,
        loss_fn,
        mesh,
        remembers=config.loss.name in MEMORIES,
        **_arrangement(config),
    )


def build_measure(config: ConfigDict, towers: Towers, mesh: Mesh) -> MeasureOfBatch:
    """What that loss's negatives are: see `make_measure`."""
    known = arguments_of(measure_negatives)
    options = {
        name: value
        for name, value in {**config.loss.options, **_settings(config.loss)}.items()
        if name in known
    }
    measure_fn = functools.partial(measure_negatives, **options)
    return make_measure(towers.encode, measure_fn, mesh, **_arrangement(config))


def _arrangement(config: ConfigDict) -> dict[str, Any]:
    beyond, name = build_beyond(config), config.loss.name
    if beyond.budgets.any_tier and "tiers" not in arguments_of(LOSSES[name]):
        raise ValueError(
            f"the loss {name!r} takes no negatives beside its batch's; leave negatives.bank.kind "
            "None, and negatives.tiers at 0"
        )
    return {
        "masks": _masks(config.loss),
        "chunk_sizes": _chunk_sizes(config),
        "beyond": beyond,
        "needs": batch_needs(config),
    }


def batch_needs(config: ConfigDict) -> tuple[str, ...]:
    """What a batch of the config must hold beside its pairs, rows and groups.

    Raises:
      ValueError: if the loss and `config.data.negatives` do not go together.
    """
    name, file = config.loss.name, config.data.get("negatives")
    arguments = arguments_of(LOSSES[name])
    mines = mining_rule(config) is not None
    if (file is not None or mines) and "negatives" not in arguments:
        setting = "negatives.mined.refresh_every" if mines else f"data.negatives={file}"
        raise ValueError(f"{setting}, but the loss {name!r} takes none; leave it None")
    scored = "teacher_scores" in arguments
    if scored and file is None:
        raise ValueError(
            f"the loss {name!r} needs a teacher's scores: set data.negatives to an .npz that has "
            "'teacher_scores' beside each row's negatives"
        )
    guided = config.data.get("guides") is not None
    needed = {"negatives": file is not None or mines, "teacher_scores": scored, "guides": guided}
    return tuple(column for column, wanted in needed.items() if wanted)


def _loss_fn(config: ConfigDict) -> Callable:
    bound = _settings(config)
    not_options = (*_BATCH_ARGUMENTS, *_CONFIG_ARGUMENTS)
    loss_fn = bind_options(
        "loss", config.name, LOSSES, dict(config.options), not_options=not_options
    )
    for name in ("margin", "relative_margin"):
        if name in bound and name not in arguments_of(LOSSES[config.name]):
            raise ValueError(f"loss.{name}={bound[name]}, but {config.name!r} takes none")
    if config.name in MEMORIES:
        bounds = TemperatureBounds(**config.temperature)
        bound["temperature_bounds"] = (bounds.minimum, bounds.maximum)
    if config.get("bias") is not None and "bias" not in arguments_of(LOSSES[config.name]):
        raise ValueError(
            f"loss.bias={config.bias} is learned by losses that have one; {config.name!r} has none"
        )
    if config.get("bias") is not None and "bias" in config.options:
        raise ValueError("loss.bias and loss.options.bias are both given; leave one out")
    loss_fn = functools.partial(loss_fn, **bound)
    dims = config.get("matryoshka_dims", ())
    if dims and config.name in MEMORIES:
        raise ValueError(
            f"loss.matryoshka_dims={tuple(dims)} with {config.name!r}, which remembers one number "
            "of each row, not one for each length; leave one of the two out"
        )
    return matryoshka(loss_fn, dims=dims) if dims else loss_fn


def _settings(config: ConfigDict) -> dict[str, Any]:
    """What a config says of the loss beside its options, where it says anything."""
    names = ("exchange", "implementation", "margin", "relative_margin")
    found = {name: config.get(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def build_memory(
    config: ConfigDict,
    num_rows: int | None,
    groups: Integer[np.ndarray, " n"] | None = None,
) -> dict[str, PyTree]:
    """What a run of so many training rows, of these groups, remembers before the first batch."""
    loss = config.loss
    memory = negatives_memory(config, num_rows, groups) | assignment_memory(config, num_rows)
    if loss.name in MEMORIES:
        if num_rows is None:
            raise ValueError("the loss remembers rows; give the number of them")
        bounds = TemperatureBounds(**loss.temperature)
        memory["rows"] = MEMORIES[loss.name](num_rows, temperature=bounds.initial, **loss.options)
    return memory


def _chunk_sizes(config: ConfigDict) -> dict[str, int] | None:
    """How many of a device's rows are encoded at a time, by side; `None` for all."""
    options = dict(config.get("grad_cache", {}))
    size, tokens = options.get("chunk_size"), options.get("chunk_tokens")
    if size is not None and tokens is not None:
        raise ValueError(
            f"grad_cache.chunk_size={size} and grad_cache.chunk_tokens={tokens} are both given; "
            "leave one out"
        )
    for name, value in (("chunk_size", size), ("chunk_tokens", tokens)):
        if value is not None and value < 1:
            raise ValueError(f"grad_cache.{name}={value}; set it to at least 1, or leave it out")
    if size is not None:
        return dict.fromkeys(SIDES, int(size))
    if tokens is not None:
        return {
            side: rows_per_chunk(width, max_tokens=tokens)
            for side, width in config.data.max_tokens.items()
        }
    return None


def _masks(config: ConfigDict) -> dict[str, str]:
    unknown = set(config.masks) - set(MASKS)
    if unknown:
        raise ValueError(f"loss.masks={config.masks} are unknown; use some of {', '.join(MASKS)}")
    masks = {MASKS[column]: column for column in MASKS if column in config.masks}
    arguments = arguments_of(LOSSES[config.name])
    for argument, column in masks.items():
        if argument not in arguments:
            raise ValueError(
                f"loss.masks: {config.name!r} takes no {column!r}; leave "
                'it out (--config.loss.masks="()" names none)'
            )
    for column, argument in MASKS.items():
        needed = argument in arguments and arguments[argument].default is inspect.Parameter.empty
        if needed and argument not in masks:
            raise ValueError(
                f"loss.masks={tuple(config.masks)}: {config.name!r} needs {column!r} among them"
            )
    return masks
