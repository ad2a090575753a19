"""From a config to the loss of a batch: losses, masks, banks and gradient caches by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.batch_loss import (
    BeyondBatch,
    LossOfBatch,
    MeasureOfBatch,
    make_loss,
    make_measure,
)
from jaxcl.data.guides import guide_dim
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
from jaxcl.models.towers import SIDES, Towers
from jaxcl.negatives.memory_bank import MemoryBank, init_bank, update_instances, update_queue
from jaxcl.negatives.mining import MiningRule
from jaxcl.negatives.tiers import TierBudgets, strata_of
from jaxcl.ops.row_tables import ENTRIES_MULTIPLE, padded_entries
from jaxcl.options import arguments_of, bind_options
from jaxcl.train_step import TemperatureBounds
from jaxcl.typing import Integer, PyTree, Scalar

__all__ = [
    "BANKS",
    "GUIDES",
    "LOSSES",
    "MASKS",
    "MEMORIES",
    "batch_needs",
    "build_beyond",
    "build_loss",
    "build_measure",
    "build_memory",
    "build_momentum",
    "mining_rule",
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

BANKS = ("queue", "instance")
"""Memory banks by name, as `config.negatives.bank.kind`."""

GUIDES = ("momentum", "data")
"""Who may judge similarity in place of the model, as `config.negatives.guide`."""

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
        **_arrangement(config, mesh),
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
    return make_measure(towers.encode, measure_fn, mesh, **_arrangement(config, mesh))


def _arrangement(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    beyond = build_beyond(config)
    if beyond.update_banks and ENTRIES_MULTIPLE % mesh.size:
        raise ValueError(
            f"a bank is divided over the devices: {mesh.size} do not divide {ENTRIES_MULTIPLE}; "
            "use a number that does"
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
    memory: dict[str, PyTree] = {}
    remembers = {"the loss": loss.name in MEMORIES, "the bank": _bank_kind(config) == "instance"}
    for what, needed in remembers.items():
        if needed and num_rows is None:
            raise ValueError(f"{what} remembers rows; give the number of them")
    if loss.name in MEMORIES:
        bounds = TemperatureBounds(**loss.temperature)
        memory["rows"] = MEMORIES[loss.name](num_rows, temperature=bounds.initial, **loss.options)
    beyond = build_beyond(config)
    if beyond.update_banks:
        bank = config.negatives.bank
        slots: Any = num_rows if bank.kind == "instance" else bank.slots
        how = {"dtype": jnp.dtype(bank.dtype), "guide_dim": _guide_dim(config)}
        memory["bank"] = {
            side: init_bank(slots, config.model.dim, **how) for side in beyond.update_banks
        }
    if mining_rule(config) is not None and num_rows is not None:
        per_query = config.negatives.mined.per_query
        memory["mined"] = jnp.full((padded_entries(num_rows), per_query), -1, jnp.int32)
    if beyond.budgets.stratified:
        if groups is None:
            raise ValueError("a stratified draw goes by the rows' groups; give them")
        proportions = config.negatives.proportions
        memory["strata"] = strata_of(
            groups,
            count=beyond.budgets.stratified,
            proportions=proportions if isinstance(proportions, str) else dict(proportions),
        )
    if build_momentum(config) is not None:
        memory["momentum"] = {}  # which becomes a copy of the towers
    return memory


def mining_rule(config: ConfigDict) -> MiningRule | None:
    """How a run mines its own negatives while it trains; `None` if it does not."""
    options = config.negatives.mined if "negatives" in config else None
    if options is None or options.refresh_every is None:
        return None
    if options.refresh_every < 1:
        raise ValueError(f"negatives.mined.refresh_every={options.refresh_every}; 1 is the least")
    if _bank_kind(config) != "instance":
        raise ValueError(
            "negatives.mined.refresh_every mines from a slot for each training row; set "
            "negatives.bank.kind='instance'"
        )
    if config.data.get("negatives") is not None:
        raise ValueError(
            "negatives.mined.refresh_every and data.negatives both give each row its negatives; "
            "leave one None"
        )
    settings = {name: options[name] for name in MiningRule._fields}
    rule = MiningRule(**settings | {"rank_range": tuple(settings["rank_range"])})
    try:
        rule.check()
    except ValueError as error:
        raise ValueError(f"negatives.mined: {error}") from error
    return rule


def build_momentum(config: ConfigDict) -> Callable[[Scalar], Scalar] | None:
    """Step -> how much of the momentum encoder an update leaves; `None` without such an encoder.

    It rises from the initial to the final value along a cosine, as in Grill et al., "Bootstrap Your
    Own Latent", 2020.
    """
    options = config.negatives.momentum_encoder if "negatives" in config else None
    if options is None or options.initial is None:
        return None
    initial, final = options.initial, options.final
    if not 0 <= initial <= final <= 1:
        raise ValueError(
            f"negatives.momentum_encoder: initial={initial}, final={final}; they lie in [0, 1] and "
            "do not fall"
        )
    last = max(config.steps - 1, 1)
    return lambda step: (
        final - (final - initial) * (1 + jnp.cos(jnp.pi * jnp.minimum(step / last, 1))) / 2
    )


def build_beyond(config: ConfigDict) -> BeyondBatch:
    """The negatives of `config.negatives`.

    Raises:
      ValueError: for what does not go together.
    """
    if "negatives" not in config:
        return BeyondBatch()
    kind, tiers = _bank_kind(config), TierBudgets(**config.negatives.tiers)
    budgets = tiers._replace(whole=tiers.whole and kind is not None)
    _check_tiers(config, kind, budgets)
    margins = {
        name: config.loss[name]
        for name in ("margin", "relative_margin")
        if config.loss.get(name) is not None
    }
    sides: tuple[str, ...] = () if kind is None else ("key",)
    if mining_rule(config) is not None:
        sides = SIDES
    guide = config.negatives.guide
    if guide not in (None, *GUIDES):
        raise ValueError(
            f"negatives.guide={guide!r} is unknown; use one of {', '.join(GUIDES)}, or None"
        )
    if guide is not None and not margins:
        raise ValueError(
            f"negatives.guide={guide!r} judges by a margin; set loss.margin or "
            "loss.relative_margin (0 will do)"
        )
    if guide == "momentum" and build_momentum(config) is None:
        raise ValueError("negatives.guide='momentum' needs negatives.momentum_encoder.initial")
    if (guide == "data") != (config.data.get("guides") is not None):
        raise ValueError("negatives.guide='data' and data.guides, its file, need each other")
    if guide == "data" and budgets.synthetic:
        raise ValueError("negatives.guide='data' has not seen synthetic negatives; use 'momentum'")
    return BeyondBatch(budgets, dict.fromkeys(sides, _bank_update(config, kind)), guide, margins)


def _check_tiers(config: ConfigDict, kind: str | None, budgets: TierBudgets) -> None:
    for name in ("uniform", "stratified", "nearest", "mixed", "mixed_with_query", "perturbed"):
        if getattr(budgets, name) < 0:
            raise ValueError(f"negatives.tiers.{name}={getattr(budgets, name)}; 0 is the least")
    if budgets.synthetic and budgets.hardest < 1:
        raise ValueError(f"negatives.tiers.hardest={budgets.hardest}; set it to at least 1")
    if kind is None and budgets.drawn:
        raise ValueError(
            "negatives.tiers draws from a bank; set negatives.bank.kind to one of "
            f"{', '.join(BANKS)}"
        )
    if budgets.whole and budgets.drawn:
        raise ValueError(
            "negatives.tiers.whole has every slot of the bank count already; set it to False, or "
            "uniform, stratified and nearest to 0"
        )
    if budgets.stratified and config.data.group_field is None:
        raise ValueError("negatives.tiers.stratified goes by group; set data.group_field")
    name = config.loss.name
    if budgets.any_tier and "tiers" not in arguments_of(LOSSES[name]):
        raise ValueError(
            f"the loss {name!r} takes no negatives beside its batch's; leave negatives.bank.kind "
            "None, and negatives.tiers at 0"
        )
    if (kind is not None or budgets.synthetic) and not {"row", "text"} & set(config.loss.masks):
        raise ValueError(
            "a bank holds rows of this batch, too: put 'row' or 'text' among loss.masks, by which "
            "none is its own negative"
        )
    if (kind is not None or budgets.synthetic) and config.loss.get("matryoshka_dims", ()):
        raise ValueError(
            "negatives beside the batch's with loss.matryoshka_dims: they are whole embeddings; "
            "leave one of the two out"
        )


def _bank_kind(config: ConfigDict) -> str | None:
    kind = config.negatives.bank.kind if "negatives" in config else None
    if kind is not None and kind not in BANKS:
        raise ValueError(
            f"negatives.bank.kind={kind!r} is unknown; use one of {', '.join(BANKS)}, or None"
        )
    return kind


def _bank_update(config: ConfigDict, kind: str | None) -> Callable[..., MemoryBank]:
    """`(bank, vectors, rows, ids, groups, guides) -> bank`."""
    bank = config.negatives.bank
    if not 0 <= bank.momentum < 1:
        raise ValueError(f"negatives.bank.momentum={bank.momentum}; set it to at least 0, below 1")
    if bank.slots < 1:
        raise ValueError(f"negatives.bank.slots={bank.slots}; set it to at least 1")
    if kind == "instance":
        return lambda old, vectors, rows, ids, groups, guides: update_instances(
            old, vectors, rows, groups, momentum=bank.momentum, ids=ids, guides=guides
        )
    return lambda old, vectors, rows, ids, groups, guides: update_queue(
        old, vectors, ids, groups, num_slots=bank.slots, guides=guides
    )


def _guide_dim(config: ConfigDict) -> int | None:
    """Width of the embeddings in the file of `data.guides`."""
    return None if config.data.get("guides") is None else guide_dim(config.data.guides)


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
            raise ValueError(f"loss.masks: {config.name!r} takes no {column!r}; leave it out")
    for column, argument in MASKS.items():
        needed = argument in arguments and arguments[argument].default is inspect.Parameter.empty
        if needed and argument not in masks:
            raise ValueError(
                f"loss.masks={tuple(config.masks)}: {config.name!r} needs {column!r} among them"
            )
    return masks
