"""From a config to the negatives beside the batch's: banks, tiers, mining, who judges them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcl.data.row_guides import guide_dim
from jaxcl.negatives.memory_bank import MemoryBank, init_bank, update_instances, update_queue
from jaxcl.negatives.mining import MiningRule
from jaxcl.negatives.tiers import TierBudgets, strata_of
from jaxcl.ops.row_tables import ENTRIES_MULTIPLE, padded_entries
from jaxcl.settings.build_assignment import gcbs_rule
from jaxcl.step.batch_loss import BeyondBatch
from jaxcl.typing import SIDES, Integer, PyTree, Scalar

__all__ = [
    "BANKS",
    "GUIDES",
    "build_beyond",
    "build_momentum",
    "check_bank_divides",
    "mining_rule",
    "negatives_memory",
    "tiers_left_empty",
]

BANKS = ("queue", "instance")
"""Memory banks by name, as `config.negatives.bank.kind`."""

GUIDES = ("momentum", "data")
"""Who may judge similarity in place of the model, as `config.negatives.guide`."""


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
    if mining_rule(config) is not None or _chooses_batches(config):
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
    if build_momentum(config) is not None and kind is None and guide != "momentum":
        raise ValueError(
            "negatives.momentum_encoder.initial, but nobody reads that encoder: it writes a bank "
            "(negatives.bank.kind) and judges (negatives.guide='momentum'); leave it None"
        )
    if guide == "data" and budgets.synthetic:
        raise ValueError("negatives.guide='data' has not seen synthetic negatives; use 'momentum'")
    return BeyondBatch(budgets, dict.fromkeys(sides, _bank_update(config, kind)), guide, margins)


def check_bank_divides(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a `ValueError` if a bank's slots do not divide over the devices of a mesh."""
    if build_beyond(config).update_banks and ENTRIES_MULTIPLE % mesh.size:
        raise ValueError(
            f"a bank is divided over the devices: {mesh.size} do not divide {ENTRIES_MULTIPLE}; "
            "use a number that does"
        )


def tiers_left_empty(config: ConfigDict, num_rows: int) -> list[str]:
    """The tiers that have nothing to draw, since `uniform` has every slot of the bank."""
    budgets, kind = build_beyond(config).budgets, _bank_kind(config)
    if kind is None:
        return []
    slots = num_rows if kind == "instance" else config.negatives.bank.slots
    others = ("stratified", "nearest") if budgets.uniform >= slots else ()
    return [name for name in others if getattr(budgets, name)]


def negatives_memory(
    config: ConfigDict,
    num_rows: int | None,
    groups: Integer[np.ndarray, " n"] | None = None,
) -> dict[str, PyTree]:
    """What the negatives of a run of so many training rows, of these groups, begin with."""
    memory: dict[str, PyTree] = {}
    if _bank_kind(config) == "instance" and num_rows is None:
        raise ValueError("the bank remembers rows; give the number of them")
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
        by = config.negatives.proportions
        proportions = dict(config.negatives.weights) if by == "weights" else by
        count = beyond.budgets.stratified
        memory["strata"] = strata_of(groups, count=count, proportions=proportions)
    if build_momentum(config) is not None:
        memory["momentum"] = {}  # which becomes a copy of the towers
    return memory


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


def mining_rule(config: ConfigDict) -> MiningRule | None:
    """How a run mines its own negatives while it trains; `None` if it does not."""
    options = config.negatives.mined if "negatives" in config else None
    if options is None or options.refresh_every is None:
        return None
    if options.refresh_every < 1:
        raise ValueError(f"negatives.mined.refresh_every={options.refresh_every}; 1 is the least")
    if options.refresh_every >= config.steps:
        raise ValueError(
            f"negatives.mined.refresh_every={options.refresh_every} never comes in "
            f"{config.steps} steps; set it to less"
        )
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


def _check_tiers(config: ConfigDict, kind: str | None, budgets: TierBudgets) -> None:
    for name in ("uniform", "stratified", "nearest", "mixed", "mixed_with_query", "perturbed"):
        if getattr(budgets, name) < 0:
            raise ValueError(f"negatives.tiers.{name}={getattr(budgets, name)}; 0 is the least")
    if budgets.synthetic and budgets.hardest < 1:
        raise ValueError(f"negatives.tiers.hardest={budgets.hardest}; set it to at least 1")
    drawn = budgets.whole or budgets.drawn or (budgets.synthetic and not budgets.of_batch)
    read = drawn or mining_rule(config) is not None or _chooses_batches(config)
    if kind is not None and not read:
        raise ValueError(
            f"negatives.bank.kind={kind!r}, but nobody reads the bank; set negatives.tiers.whole "
            "to True, negatives.tiers.uniform, stratified, nearest or a synthetic tier (without "
            "of_batch) or negatives.mined.refresh_every to a number, or assignment.gcbs.embeddings "
            "to bank"
        )
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
    if (kind is not None or budgets.synthetic) and not {"row", "text"} & set(config.loss.masks):
        raise ValueError(
            "a bank holds rows of this batch, too: put 'row' or 'text' among loss.masks, by which "
            "none is its own negative"
        )
    explicit = config.data.get("negatives") is not None
    if (kind or budgets.synthetic or explicit) and config.loss.get("matryoshka_dims", ()):
        raise ValueError(
            "negatives beside the batch's with loss.matryoshka_dims: they are whole embeddings; "
            "leave one of the two out"
        )


def _chooses_batches(config: ConfigDict) -> bool:
    """Whether the banks are what batches are chosen by."""
    rule = gcbs_rule(config)
    return rule is not None and rule.from_bank


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
    try:
        floating = jnp.issubdtype(jnp.dtype(bank.dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"negatives.bank.dtype={bank.dtype!r}; use float32, bfloat16 or float16")
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
