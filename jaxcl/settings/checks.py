"""The checks that look at several settings at once, in the order of the config's sections."""

import re
from collections.abc import Collection

import jax.numpy as jnp

from jaxcl.assignment import random_to_hard
from jaxcl.losses import ExplicitNegatives, OwnNegatives, SharedNegatives
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.settings.check_model import check_model
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
from jaxcl.settings.parts import is_function_name
from jaxcl.settings.sections import DataSet, DataSettings, FileSettings, Settings, unresolved
from jaxcl.typing import SIDES

__all__ = ["check_settings"]

_APART = ("text", "group")
_BAD_ROWS = ("error", "skip")
_FIRST = "first"
_METHODS = ("bm25", "dense", "hybrid")
_METRIC_PREFIXES = (
    *("assignment", "bank", "machine", "mined", "negatives", "test", "time", "train"),
    "validation",
)
_SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_settings(settings: Settings) -> None:
    """Raise a `ValueError` for settings that cannot go together."""
    _check_data(settings.data)
    check_model(settings)
    _check_loss(settings)
    _check_bank(settings)
    _check_tiers(settings, settings.negatives.tiers)
    _check_mining(settings)
    _check_judges(settings)
    _check_assignment(settings)
    _check_gcbs(settings)
    _check_grad_cache(settings)
    _check_methods(settings.evaluation.methods)
    _check_sets(settings)


def _check_data(data: DataSettings) -> None:
    if data.negatives is not None and data.negatives_per_row:
        raise ValueError(
            f"data.negatives_per_row={data.negatives_per_row} counts texts that rows bring, and "
            f"data.negatives={data.negatives} gives each row other negatives; leave one None"
        )
    _check_files("data.files", data.files)
    for name, data_set in data.concatenated.items():
        _check_concatenated(f"data.concatenated.{name}", name, data_set, data)


def _check_files(where: str, files: FileSettings) -> None:
    if files.bad_rows not in _BAD_ROWS:
        raise ValueError(
            f"{where}.bad_rows={files.bad_rows!r} is unknown; use {' or '.join(_BAD_ROWS)}"
        )
    if files.label_field is not None and files.min_label is None:
        raise ValueError(
            f"{where}.label_field={files.label_field!r} is read with {where}.min_label, the least "
            "label of the rows to train on; set it"
        )


def _check_concatenated(where: str, name: str, data_set: DataSet, data: DataSettings) -> None:
    if name == _FIRST:
        raise ValueError(f"{where}: {_FIRST!r} is what data.name is called; choose another name")
    if not data_set.name or not data_set.splits:
        raise ValueError(
            f"{where} needs a name, of a data set or its folder, and splits, role -> split, such "
            "as {'train': 'train'}"
        )
    _check_files(f"{where}.files", data_set.files)
    if data_set.name == "code_pairs":
        raise ValueError(
            f"{where}.name='code_pairs' is made for data.name alone; give the folder of prepared "
            "ones, as some run's data.json names it"
        )
    if (data_set.group_field is None) != (data.group_field is None):
        raise ValueError(
            f"{where}.group_field={data_set.group_field!r}, but data.group_field="
            f"{data.group_field!r}: rows without a group would all be of one; give both one, "
            "or neither"
        )
    for side in SIDES:
        _check_prompt(f"{where}.prompts.{side}", getattr(data_set.prompts, side), data, side)
    for role in data_set.splits:
        if role not in data.splits:
            raise ValueError(
                f"{where}.splits has {role!r}; data.splits has {', '.join(data.splits)}, which "
                "rows can follow"
            )
        missing = set(data.metadata_fields) - set(data_set.metadata_fields)
        if role != "train" and missing:
            raise ValueError(
                f"{where}.metadata_fields lacks {sorted(missing)}, which the evaluation of "
                f"{role!r} may read; give them, or leave {role!r} out of its splits"
            )


def _check_prompt(setting: str, prompt: str | None, data: DataSettings, side: str) -> None:
    modality = getattr(data.modality, side)
    if prompt is not None and modality != "text":
        raise ValueError(
            f"{setting}={prompt!r} has no effect: data.modality.{side}={modality!r}, and only "
            "texts have prompts; leave it out"
        )
    if prompt in SIDES:
        raise ValueError(
            f"{setting}={prompt!r} is what the run's own prompt is called; write the prompt out, "
            f"such as {prompt + ': '!r}"
        )


def _check_loss(settings: Settings) -> None:
    loss, data = settings.loss, settings.data
    _check_names("loss.masks", loss.masks, MASKS)
    if "group" in loss.masks and data.group_field is None:
        raise ValueError(
            "loss.masks names 'group', but data.group_field is None: all rows would be of one "
            "group, and no negative would count. Set data.group_field, or leave 'group' out"
        )
    if loss.exchange not in ("gather", "ring"):
        raise ValueError(f"loss.exchange={loss.exchange!r} is unknown; use gather or ring")
    bounds = loss.temperature
    if not bounds.minimum <= bounds.initial <= bounds.maximum:
        raise ValueError(
            f"loss.temperature={bounds._asdict()}; wanted is 0 < minimum <= initial <= maximum"
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
    drawn = tiers.drawn + tiers.synthetic > 0 or (tiers.whole and bank is not None)
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


def _check_bank(settings: Settings) -> None:
    bank = settings.negatives.bank
    if bank.kind not in (None, *BANKS):
        raise ValueError(
            f"negatives.bank.kind={bank.kind!r} is unknown; use one of {', '.join(BANKS)}, or None"
        )
    try:
        floating = jnp.issubdtype(jnp.dtype(bank.dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"negatives.bank.dtype={bank.dtype!r}; use float32, bfloat16 or float16")


def _check_tiers(settings: Settings, budgets: TierBudgets) -> None:
    kind = settings.negatives.bank.kind
    drawn = budgets.whole or budgets.drawn or (budgets.synthetic and not budgets.of_batch)
    rule = gcbs_rule(settings)
    chooses_batches = rule is not None and rule.from_bank
    mines = settings.negatives.mined.refresh_every is not None
    if kind is not None and not (drawn or mines or chooses_batches):
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
    if kind is not None and budgets.whole and budgets.drawn:
        raise ValueError(
            "negatives.tiers.whole has every slot of the bank count already; set it to False, or "
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
    if mined.refresh_every >= settings.steps:
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
    """The momentum encoder and the guide model."""
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
            f"negatives.guide={guide!r} judges by a margin; set loss.margin or "
            "loss.relative_margin (0 will do)"
        )
    if guide == "momentum" and initial is None:
        raise ValueError("negatives.guide='momentum' needs negatives.momentum_encoder.initial")
    if (guide == "data") != (settings.data.guides is not None):
        raise ValueError("negatives.guide='data' and data.guides, its file, need each other")
    if initial is not None and negatives.bank.kind is None and guide != "momentum":
        raise ValueError(
            "negatives.momentum_encoder.initial, but nobody reads that encoder: it writes a bank "
            "(negatives.bank.kind) and judges (negatives.guide='momentum'); leave it None"
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
    setting, given = needed[by]
    if not given:
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
    _check_names("assignment.gcbs.apart", options.apart, _APART)
    if "group" in options.apart and settings.data.group_field is None:
        raise ValueError("assignment.gcbs.apart names 'group', but data.group_field is None")
    try:
        rule.settings.check()
        random_to_hard(options.random_initial, options.random_final, settings.steps)
    except ValueError as error:
        raise ValueError(f"assignment.gcbs: {error}") from error
    # Last, so that a wrong name is reported before a run that is too short for it.
    if options.refresh_epochs is None and options.refresh_every >= settings.steps:
        raise ValueError(
            f"assignment.gcbs.refresh_every={options.refresh_every} never comes in "
            f"{settings.steps} steps; set it to a step before the last, or train longer"
        )


def _check_grad_cache(settings: Settings) -> None:
    size, tokens = settings.grad_cache
    if size is not None and tokens is not None:
        raise ValueError(
            f"grad_cache.chunk_size={size} and grad_cache.chunk_tokens={tokens} are both given; "
            "leave one out"
        )


def _check_methods(methods: Collection[str]) -> None:
    _check_names("evaluation.methods", methods, _METHODS)
    if not methods:
        raise ValueError(f"evaluation.methods=(); name one or more of {', '.join(_METHODS)}")


def _check_sets(settings: Settings) -> None:
    evaluation = settings.evaluation
    for name in evaluation.sets:
        if not _SET_NAME.fullmatch(name) or name in _METRIC_PREFIXES:
            raise ValueError(
                f"evaluation.sets has the name {name!r}; use letters, digits, - and _, and none of "
                f"{', '.join(_METRIC_PREFIXES)}, which begin the names of other metrics"
            )
    if evaluation.sets and set(settings.data.modality) != {"text"}:
        raise ValueError(
            f"evaluation.sets are texts, and data.modality is {settings.data.modality._asdict()}; "
            "leave evaluation.sets empty"
        )
    if evaluation.patience is not None and evaluation.best_metric is None:
        raise ValueError(
            f"evaluation.patience={evaluation.patience} counts evaluations of "
            "evaluation.best_metric, which is None; name a metric, such as "
            "'validation/dense/mrr@10'"
        )


def _check_names(setting: str, names: Collection[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{setting} names {', '.join(map(repr, unknown))}; use some of {', '.join(known)}"
        )
