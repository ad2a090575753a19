"""The checks of combinations of settings, in the order of the config's sections."""

import jax.numpy as jnp

from jaxcl.assignment import random_to_hard
from jaxcl.losses import ExplicitNegatives, OwnNegatives, SharedNegatives
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.settings.check_data import check_data
from jaxcl.settings.check_evaluation import check_evaluation_settings
from jaxcl.settings.check_model import check_model
from jaxcl.settings.check_names import check_names
from jaxcl.settings.derived import (
    ASSIGNMENTS,
    BANKS,
    EMBEDDINGS,
    GUIDES,
    MASKS,
    SOURCES,
    data_set_names,
    gcbs_rule,
    sources_by,
)
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.parts import is_function_name
from jaxcl.settings.sections import Settings, unresolved

__all__ = ["check_settings"]

_KEEP_APART = ("text", "group")


def check_settings(settings: Settings) -> None:
    """Raise a `ValueError` for incompatible settings."""
    check_data(settings.data)
    check_model(settings)
    _check_loss(settings)
    _check_bank(settings)
    _check_tiers(settings, settings.negatives.tiers)
    _check_mining(settings)
    _check_judges(settings)
    _check_assignment(settings)
    _check_gcbs(settings)
    _check_grad_cache(settings)
    _check_accumulation(settings)
    _check_optimizer(settings)
    check_evaluation_settings(settings)


def _check_loss(settings: Settings) -> None:
    loss, data = settings.loss, settings.data
    check_names("loss.masks", loss.masks, MASKS)
    if "group" in loss.masks and data.group_field is None:
        raise ValueError(
            "loss.masks names 'group', but data.group_field is None: all rows would be in one "
            "group, and no negatives would be left. Set data.group_field, or remove 'group'"
        )
    if loss.exchange not in ("gather", "ring"):
        raise ValueError(f"loss.exchange={loss.exchange!r} is unknown; use gather or ring")
    bounds = loss.temperature
    if not bounds.minimum <= bounds.initial <= bounds.maximum:
        raise ValueError(
            f"loss.temperature={bounds._asdict()}; set 0 < minimum <= initial <= maximum"
        )
    longest = settings.model.dim
    if loss.matryoshka_dims and max(loss.matryoshka_dims) > longest:
        raise ValueError(
            f"loss.matryoshka_dims={loss.matryoshka_dims} has a length above model.dim={longest}"
        )
    if settings.parts.loss.function is not unresolved:
        _check_given(settings)
        _check_taken(settings)


def _check_given(settings: Settings) -> None:
    """Check that the loss takes every argument that the settings would give it."""
    loss, name, part = settings.loss, settings.loss.name, settings.parts.loss
    if "group" in loss.masks and MASKS["group"] not in part.masks:
        raise ValueError(f"loss.masks names 'group', but {name!r} does not mask by groups")
    if "text" in loss.masks and "labels" in part.columns:
        raise ValueError(
            f"loss.masks names 'text', but {name!r} compares classes, so rows with equal texts and "
            "different classes are negatives; use 'row'"
        )
    for margin, value in loss.margins.items():
        if margin not in part.masks:
            raise ValueError(f"loss.{margin}={value}, but {name!r} takes none")
    if loss.bias is not None and not part.has_bias:
        raise ValueError(
            f"loss.bias={loss.bias} is learned by losses that have one; {name!r} has none"
        )
    if loss.bias is not None and "bias" in loss.options:
        raise ValueError("loss.bias and loss.options.bias are both given; leave one out")
    data, mined = settings.data, settings.negatives.mined
    explicit = {
        "data.negatives": data.negatives is not None,
        "data.negatives_per_row": bool(data.negatives_per_row),
        "negatives.mined.refresh_every": mined.refresh_every is not None,
    }
    setting = next((name for name, is_set in explicit.items() if is_set), None)
    if setting is not None and ExplicitNegatives not in part.negatives:
        raise ValueError(f"{setting} is set, but the loss {name!r} takes no explicit negatives")
    tiers, bank = settings.negatives.tiers, settings.negatives.bank.kind
    drawn = tiers.drawn + tiers.synthetic > 0 or (tiers.full_bank and bank is not None)
    if drawn and not {OwnNegatives, SharedNegatives} <= set(part.negatives):
        raise ValueError(
            f"the loss {name!r} takes no negatives of a bank and no synthetic ones; leave "
            "negatives.bank.kind None, and negatives.tiers at 0"
        )


def _check_taken(settings: Settings) -> None:
    """Check that the data have the columns that the loss takes."""
    data, columns, name = settings.data, settings.parts.loss.columns, settings.loss.name
    if "group" in columns.values() and data.group_field is None:
        raise ValueError(f"the loss {name!r} needs the rows' groups; set data.group_field")
    if "guides" in columns.values() and data.guides is None:
        raise ValueError(
            f"the loss {name!r} needs a teacher's embeddings; set data.guides to an .npz file with "
            "an embedding of the query and of the key for each training row"
        )
    if "score" in columns.values() and data.score_field is None:
        raise ValueError(
            f"the loss {name!r} needs the score of each pair; set data.score_field to its column, "
            "such as 'score'"
        )


def _check_bank(settings: Settings) -> None:
    bank = settings.negatives.bank
    if bank.kind not in (None, *BANKS):
        raise ValueError(
            f"negatives.bank.kind={bank.kind!r} is unknown; use one of {', '.join(BANKS)}, or None"
        )
    _check_floating("negatives.bank.dtype", bank.dtype)


def _check_tiers(settings: Settings, budgets: TierBudgets) -> None:
    kind = settings.negatives.bank.kind
    drawn = budgets.full_bank or budgets.drawn or (budgets.synthetic and not budgets.of_batch)
    rule = gcbs_rule(settings)
    chooses_batches = rule is not None and rule.from_bank
    mines = settings.negatives.mined.refresh_every is not None
    if kind is not None and not (drawn or mines or chooses_batches):
        raise ValueError(
            f"negatives.bank.kind={kind!r}, but nothing reads the bank; set "
            "negatives.tiers.full_bank to True, negatives.tiers.uniform, stratified, nearest or a "
            "synthetic tier (without of_batch) or negatives.mined.refresh_every to a number, or "
            "assignment.gcbs.embeddings to bank"
        )
    if kind is None and budgets.drawn:
        raise ValueError(
            "negatives.tiers draws from a bank; set negatives.bank.kind to one of "
            f"{', '.join(BANKS)}"
        )
    if kind is not None and budgets.full_bank and budgets.drawn:
        raise ValueError(
            "negatives.tiers.full_bank uses every slot of the bank already; set it to False, or "
            "uniform, stratified and nearest to 0"
        )
    if budgets.stratified and settings.data.group_field is None:
        raise ValueError("negatives.tiers.stratified goes by group; set data.group_field")
    if (kind is not None or budgets.synthetic) and not {"row", "text"} & set(settings.loss.masks):
        raise ValueError(
            "a bank holds rows of this batch, too: put 'row' or 'text' among loss.masks, by which "
            "none is its own negative"
        )
    if settings.negatives.proportions not in ("rows", "equal", "weights"):
        raise ValueError(
            f"negatives.proportions={settings.negatives.proportions!r} is unknown; use rows, equal "
            "or weights"
        )


def _check_mining(settings: Settings) -> None:
    mined = settings.negatives.mined
    if mined.refresh_every is None:
        return
    if settings.epochs is None and mined.refresh_every >= settings.steps:
        raise ValueError(
            f"negatives.mined.refresh_every={mined.refresh_every} never comes in "
            f"{settings.steps} steps; set it to less"
        )
    if settings.negatives.bank.kind != "instance":
        raise ValueError(
            "negatives.mined.refresh_every mines from a slot for each training row; set "
            "negatives.bank.kind='instance'"
        )
    for setting in ("negatives", "negatives_per_row"):
        if getattr(settings.data, setting):
            raise ValueError(
                f"negatives.mined.refresh_every and data.{setting} both give each row its "
                "negatives; leave one None"
            )
    try:
        mined.rule.check()
    except ValueError as error:
        raise ValueError(f"negatives.mined: {error}") from error


def _check_judges(settings: Settings) -> None:
    """Check the momentum encoder and the guide model."""
    negatives, guide = settings.negatives, settings.negatives.guide
    initial, final = negatives.momentum_encoder
    if initial is not None and initial > final:
        raise ValueError(
            f"negatives.momentum_encoder: initial={initial}, final={final}; they lie in [0, 1] and "
            "do not fall"
        )
    if guide not in (None, *GUIDES):
        raise ValueError(
            f"negatives.guide={guide!r} is unknown; use one of {', '.join(GUIDES)}, or None"
        )
    if guide is not None and not settings.loss.margins:
        raise ValueError(
            f"negatives.guide={guide!r} needs a margin; set loss.margin or "
            "loss.relative_margin (0 will do)"
        )
    if guide == "momentum" and initial is None:
        raise ValueError("negatives.guide='momentum' needs negatives.momentum_encoder.initial")
    taught = "guides" in settings.parts.loss.columns.values()  # `_check_taken` looks for the file
    if not taught and (guide == "data") != (settings.data.guides is not None):
        raise ValueError("negatives.guide='data' and data.guides, its file, need each other")
    if initial is not None and negatives.bank.kind is None and guide != "momentum":
        raise ValueError(
            f"negatives.momentum_encoder.initial={initial}, but nothing reads that encoder: it is "
            "for a bank (negatives.bank.kind) or a guide model (negatives.guide='momentum'); leave "
            "it None"
        )
    if guide == "data" and negatives.tiers.synthetic:
        raise ValueError("negatives.guide='data' has not seen synthetic negatives; use 'momentum'")


def _check_assignment(settings: Settings) -> None:
    name, data = settings.assignment.name, settings.data
    if name not in ASSIGNMENTS and not is_function_name(name):
        raise ValueError(
            f"assignment.name={name!r} is unknown; use one of {', '.join(ASSIGNMENTS)}, "
            "or package.module:function"
        )
    by = sources_by(settings) if name == "sourced" else None
    if by != "topic" and data.topics is not None:
        raise ValueError(
            "data.topics is set, but no setting reads it; set assignment.name='sourced' and "
            "assignment.sourced.by='topic', or leave it None"
        )
    if name != "sourced":
        return
    if by not in SOURCES:
        raise ValueError(
            f"assignment.sourced.by={by!r} is unknown; use one of {', '.join(SOURCES)}"
        )
    several = "data.concatenated, with a split for 'train'"
    needed = {
        "group": ("data.group_field", data.group_field),
        "data_set": (several, len(data_set_names(data)) > 1),
        "topic": ("data.topics, a file of `python -m jaxcl.topics`", data.topics),
    }
    setting, value = needed[by]
    if not value:
        raise ValueError(
            f"assignment.name='sourced' goes by {by}; set {setting}, or assignment.sourced.by to "
            f"another of {', '.join(SOURCES)}"
        )


def _check_gcbs(settings: Settings) -> None:
    if settings.assignment.name != "gcbs":
        return
    options, batch = settings.assignment.gcbs, settings.global_batch_size
    rule = gcbs_rule(settings)
    assert rule is not None
    if rule.block_size < 2 or batch % rule.block_size:
        raise ValueError(
            f"assignment.gcbs.block_size={rule.block_size} does not divide "
            f"global_batch_size={batch} into blocks of at least 2 rows; use a divisor of it"
        )
    if options.embeddings not in EMBEDDINGS:
        raise ValueError(
            f"assignment.gcbs.embeddings={options.embeddings!r} is unknown; use one of "
            f"{', '.join(EMBEDDINGS)}"
        )
    if rule.from_bank and settings.negatives.bank.kind != "instance":
        raise ValueError(
            "assignment.gcbs.embeddings='bank' reads a slot for each training row; set "
            "negatives.bank.kind='instance'"
        )
    check_names("assignment.gcbs.keep_apart", options.keep_apart, _KEEP_APART)
    if "group" in options.keep_apart and settings.data.group_field is None:
        raise ValueError("assignment.gcbs.keep_apart names 'group', but data.group_field is None")
    try:
        rule.settings.check()
        random_to_hard(options.random_initial, options.random_final, settings.steps)
    except ValueError as error:
        raise ValueError(f"assignment.gcbs: {error}") from error
    # Last, so that a wrong name is reported before a run that is too short for it.
    known = settings.epochs is None  # otherwise the steps depend on the number of rows
    if known and options.refresh_epochs is None and options.refresh_every >= settings.steps:
        raise ValueError(
            f"assignment.gcbs.refresh_every={options.refresh_every} never comes in "
            f"{settings.steps} steps; set it to a step before the last, or train longer"
        )


def _check_accumulation(settings: Settings) -> None:
    every = settings.optimizer.accumulate_steps
    if settings.epochs is None and settings.steps % every:
        fewer = settings.steps - settings.steps % every
        either = f"{fewer} or {fewer + every}" if fewer else every
        raise ValueError(
            f"optimizer.accumulate_steps={every} does not divide steps={settings.steps}; use "
            f"{either} steps"
        )


def _check_grad_cache(settings: Settings) -> None:
    size, tokens, _ = settings.grad_cache
    if size is not None and tokens is not None:
        raise ValueError(
            f"grad_cache.chunk_size={size} and grad_cache.chunk_tokens={tokens} are both given; "
            "leave one out"
        )


def _check_optimizer(settings: Settings) -> None:
    mu_dtype = settings.optimizer.options.get("mu_dtype")
    if settings.optimizer.name in OPTIMIZERS and mu_dtype is not None:
        _check_floating("optimizer.options.mu_dtype", mu_dtype)


def _check_floating(setting: str, dtype: str) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{setting}={dtype!r}; use float32, bfloat16 or float16")
