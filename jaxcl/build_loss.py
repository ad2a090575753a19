"""From a config to the loss of a batch: losses, masks, banks and gradient caches by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
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
from jaxcl.losses.running_estimate import estimate_memory, remembered_estimate_loss
from jaxcl.models.towers import SIDES, Towers
from jaxcl.negatives.memory_bank import MemoryBank, init_bank, update_instances, update_queue
from jaxcl.options import arguments_of, bind_options
from jaxcl.train_step import LossOfBatch, TemperatureBounds, make_loss
from jaxcl.typing import PyTree

__all__ = ["BANKS", "LOSSES", "MASKS", "MEMORIES", "batch_needs", "build_loss", "build_memory"]

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

BANKS = ("queue", "instance")
"""Memory banks by name, as `config.negatives.bank.kind`."""

MASKS: Mapping[str, str] = {"row": "ids", "group": "groups"}
"""Which argument of a loss goes by which column of the batch: whose equals are no negatives."""

_BATCH_ARGUMENTS = (
    *("queries", "keys", "temperature", "axis_name", "valid", "guides", *MASKS.values()),
    *("negatives", "negative_ids", "negative_groups", "negatives_valid", "negative_guides"),
    *("bank", "key_groups", "teacher_scores", "memory"),
)
_CONFIG_ARGUMENTS = ("exchange", "implementation", "temperature_bounds")


def build_loss(config: ConfigDict, towers: Towers, mesh: Mesh) -> LossOfBatch:
    """The loss of `config.loss`, encoded as `config.grad_cache` says: see `make_loss`."""
    return make_loss(
        towers.encode,
        _loss_fn(config.loss),
        mesh,
        masks=_masks(config.loss),
        chunk_sizes=_chunk_sizes(config),
        remembers=config.loss.name in MEMORIES,
        update_bank=_bank_update(config),
        needs=batch_needs(config),
    )


def batch_needs(config: ConfigDict) -> tuple[str, ...]:
    """What a batch of the config must hold beside its pairs, rows and groups.

    Raises:
      ValueError: if the loss and `config.data.negatives` do not go together.
    """
    name, file = config.loss.name, config.data.get("negatives")
    arguments = arguments_of(LOSSES[name])
    if file is not None and "negatives" not in arguments:
        raise ValueError(f"data.negatives={file}, but the loss {name!r} takes none; leave it None")
    scored = "teacher_scores" in arguments
    if scored and file is None:
        raise ValueError(
            f"the loss {name!r} needs a teacher's scores: set data.negatives to an .npz that has "
            "'teacher_scores' beside each row's negatives"
        )
    return ("negatives",) * (file is not None) + ("teacher_scores",) * scored


def _loss_fn(config: ConfigDict) -> Callable:
    bound = {"exchange": config.get("exchange"), "implementation": config.get("implementation")}
    bound = {name: value for name, value in bound.items() if value is not None}
    not_options = (*_BATCH_ARGUMENTS, *_CONFIG_ARGUMENTS)
    loss_fn = bind_options(
        "loss", config.name, LOSSES, dict(config.options), not_options=not_options
    )
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


def build_memory(config: ConfigDict, num_rows: int | None) -> dict[str, PyTree]:
    """What a run of so many training rows remembers, before the first batch."""
    loss = config.loss
    memory: dict[str, PyTree] = {}
    remembers = {"the loss": loss.name in MEMORIES, "the bank": _bank_kind(config) == "instance"}
    for what, needed in remembers.items():
        if needed and num_rows is None:
            raise ValueError(f"{what} remembers rows; give the number of them")
    if loss.name in MEMORIES:
        bounds = TemperatureBounds(**loss.temperature)
        memory["rows"] = MEMORIES[loss.name](num_rows, temperature=bounds.initial, **loss.options)
    if _bank_kind(config) is not None:
        bank = config.negatives.bank
        slots: Any = num_rows if bank.kind == "instance" else bank.slots
        memory["bank"] = init_bank(slots, config.model.dim, dtype=jnp.dtype(bank.dtype))
    return memory


def _bank_kind(config: ConfigDict) -> str | None:
    kind = config.negatives.bank.kind if "negatives" in config else None
    if kind is not None and kind not in BANKS:
        raise ValueError(
            f"negatives.bank.kind={kind!r} is unknown; use one of {', '.join(BANKS)}, or None"
        )
    return kind


def _bank_update(config: ConfigDict) -> Callable[..., MemoryBank] | None:
    kind = _bank_kind(config)
    if kind is None:
        return None
    bank = config.negatives.bank
    if "bank" not in arguments_of(LOSSES[config.loss.name]):
        raise ValueError(
            f"negatives.bank.kind={kind!r}, but the loss {config.loss.name!r} takes no bank; leave "
            "it None"
        )
    if "row" not in config.loss.masks:
        raise ValueError(
            "a bank holds rows of this batch, too: put 'row' among loss.masks, by which none is "
            "its own negative"
        )
    if config.loss.get("matryoshka_dims", ()):
        raise ValueError(
            f"negatives.bank.kind={kind!r} with loss.matryoshka_dims: a bank holds whole "
            "embeddings; leave one of the two out"
        )
    if not 0 <= bank.momentum < 1:
        raise ValueError(f"negatives.bank.momentum={bank.momentum}; set it to at least 0, below 1")
    if kind == "queue":
        if bank.slots < 1:
            raise ValueError(f"negatives.bank.slots={bank.slots}; set it to at least 1")
        return functools.partial(update_queue, num_slots=bank.slots)
    return functools.partial(update_instances, momentum=bank.momentum)


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
    masks = {MASKS[column]: column for column in config.masks}
    arguments = arguments_of(LOSSES[config.name])
    for argument, column in masks.items():
        if argument not in arguments:
            raise ValueError(f"loss.masks: {config.name!r} takes no {column!r}; leave it out")
    for argument, column in ((MASKS[column], column) for column in MASKS):
        needed = argument in arguments and arguments[argument].default is inspect.Parameter.empty
        if needed and argument not in masks:
            raise ValueError(
                f"loss.masks={tuple(config.masks)}: {config.name!r} needs {column!r} among them"
            )
    return masks
