"""Settings that have no effect, because the value of another setting keeps them unread."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from jaxcl.models import ENCODERS
from jaxcl.settings.derived import MASKS, cut_sides, ranking_methods
from jaxcl.settings.file_kinds import reads_files
from jaxcl.settings.parts import SCHEDULE_FIELDS
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = ["check_effects"]


class _Unread(NamedTuple):
    """Fields that are not read, and the condition for this.

    Attributes:
      fields: dotted names, or prefixes that end in a dot.
      holds: settings -> whether the fields are not read.
      reason: the setting that would make the fields take effect.
    """

    fields: tuple[str, ...]
    holds: Callable[[Settings], bool]
    reason: str


def _fields(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _of_schedule(field: str) -> _Unread:
    """A field of `optimizer` that only some schedules read."""
    readers = ", ".join(name for name, fields in SCHEDULE_FIELDS.items() if field in fields)

    def holds(s: Settings) -> bool:
        return field not in SCHEDULE_FIELDS.get(s.optimizer.schedule, ("warmup_steps",))

    reason = f"optimizer.schedule would have to be one of {readers}"
    return _Unread((f"optimizer.{field}",), holds, reason)


def _prompt_unread(side: str) -> _Unread:
    return _Unread(
        (f"data.prompts.{side}",),
        lambda s: getattr(s.data.modality, side) != "text",
        f"data.modality.{side}='text' reads it",
    )


def _bank_unread(field: str, *, kind: str) -> _Unread:
    """A field of `negatives.bank` that only one kind of bank reads."""
    return _Unread(
        (f"negatives.bank.{field}",),
        lambda s: s.negatives.bank.kind != kind,
        f"negatives.bank.kind={kind!r} reads it",
    )


_UNREAD = (
    _Unread(
        _fields("model.lora", "alpha", "targets", "also_train", "base_dtype"),
        lambda s: s.model.lora.rank is None,
        "model.lora.rank reads it",
    ),
    _Unread(
        ("augmentation.sides", "augmentation.options"),
        lambda s: s.augmentation.name is None,
        "augmentation.name reads it",
    ),
    _Unread(
        ("loss.masks",),
        lambda s: not {MASKS[name] for name in s.loss.masks} <= {*s.parts.loss.masks},
        "loss.name would have to name a loss that masks by these",
    ),
    _Unread(
        ("loss.exchange", "loss.implementation"),
        lambda s: not (s.parts.loss.exchanges and s.parts.loss.multiplies),
        "loss.name would have to name a loss that compares rows of different devices",
    ),
    _Unread(
        ("loss.temperature",),
        lambda s: not s.parts.loss.has_temperature,
        "loss.name would have to name a loss that has a temperature",
    ),
    _Unread(
        ("data.score_field",),
        lambda s: "score" not in s.parts.loss.columns.values(),
        "a loss that compares scores, such as loss.name='cosent', reads it",
    ),
    _Unread(
        ("grad_cache.length_buckets",),
        lambda s: not cut_sides(s),
        "the encoder of a side of texts would have to be a transformer or a decoder",
    ),
    _Unread(
        ("data.code_pairs.",),
        lambda s: s.data.name != "code_pairs",
        "data.name='code_pairs' reads it",
    ),
    _Unread(
        ("data.files.",),
        lambda s: not any(reads_files(s.data.name, split) for split in s.data.splits.values()),
        "a file of pairs as data.name reads it",
    ),
    _Unread(
        ("data.images.",),
        lambda s: "image" not in s.data.modality,
        "data.modality.query='image' or data.modality.key='image' reads it",
    ),
    *(_prompt_unread(side) for side in SIDES),
    _Unread(
        ("data.exclude_prompt",),
        lambda s: s.model.name in ENCODERS and s.model.key.name in (None, *ENCODERS),
        "the pooling of model.pretrained reads it",
    ),
    _bank_unread("slots", kind="queue"),
    _bank_unread("momentum", kind="instance"),
    _Unread(
        ("negatives.bank.dtype",),
        lambda s: s.negatives.bank.kind is None,
        "negatives.bank.kind reads it",
    ),
    _Unread(
        ("negatives.tiers.full_bank",),
        lambda s: s.negatives.tiers.full_bank and s.negatives.bank.kind is None,
        "negatives.bank.kind gives it a bank",
    ),
    _Unread(
        _fields("negatives.tiers", "hardest", "of_batch", "gradient"),
        lambda s: not s.negatives.tiers.synthetic,
        "negatives.tiers.mixed, mixed_with_query or perturbed reads it",
    ),
    _Unread(
        ("negatives.tiers.degrees",),
        lambda s: not s.negatives.tiers.perturbed,
        "negatives.tiers.perturbed reads it",
    ),
    _Unread(
        ("negatives.proportions",),
        lambda s: not s.negatives.tiers.stratified,
        "negatives.tiers.stratified reads it",
    ),
    _Unread(
        ("negatives.weights",),
        lambda s: not s.negatives.tiers.stratified or s.negatives.proportions != "weights",
        "negatives.tiers.stratified with negatives.proportions='weights' reads it",
    ),
    _Unread(
        _fields(
            "negatives.mined", "per_query", "rank_range", "margin", "relative_margin", "sampling"
        ),
        lambda s: s.negatives.mined.refresh_every is None,
        "negatives.mined.refresh_every reads it",
    ),
    _Unread(
        ("negatives.momentum_encoder.final",),
        lambda s: s.negatives.momentum_encoder.initial is None,
        "negatives.momentum_encoder.initial reads it",
    ),
    _Unread(
        ("assignment.sourced.",),
        lambda s: s.assignment.name != "sourced",
        "assignment.name='sourced' reads it",
    ),
    _Unread(
        ("assignment.gcbs.",),
        lambda s: s.assignment.name != "gcbs",
        "assignment.name='gcbs' reads it",
    ),
    _Unread(
        ("assignment.gcbs.refresh_every",),
        lambda s: s.assignment.gcbs.refresh_epochs is not None,
        "assignment.gcbs.refresh_epochs goes before it",
    ),
    _Unread(
        _fields("assignment.gcbs", "starts", "walks", "swaps", "refinements"),
        lambda s: s.assignment.gcbs.method != "bisection",
        "assignment.gcbs.method='bisection' reads it",
    ),
    _Unread(
        _fields("assignment.gcbs", "neighbours", "graph", "similarity_cap"),
        lambda s: s.assignment.gcbs.method == "rcm",
        "the other methods of assignment.gcbs.method read it",
    ),
    *(_of_schedule(field) for field in ("warmup_steps", "decay_steps", "final_rate")),
    _Unread(
        ("optimizer.no_decay",),
        lambda s: not s.optimizer.weight_decay,
        "optimizer.weight_decay above 0 reads it",
    ),
    _Unread(
        ("evaluation.rrf_k",),
        lambda s: "hybrid" not in ranking_methods(s),
        "'hybrid' among evaluation.methods reads it",
    ),
    _Unread(
        ("evaluation.min_delta",),
        lambda s: s.evaluation.patience is None,
        "evaluation.patience reads it",
    ),
    _Unread(
        ("run.parameter_rules",),
        lambda s: s.run.mesh.get("fsdp", 1) == 1,
        "run.mesh.fsdp above 1 reads it",
    ),
)


def check_effects(settings: Settings, changed: Collection[str]) -> None:
    """Raise a `ValueError` for a changed setting that has no effect.

    Args:
      settings: all settings.
      changed: dotted names of the changed fields; only these are checked.
    """
    for field in changed:
        for unread in _UNREAD:
            if _names(field, unread.fields) and unread.holds(settings):
                raise ValueError(f"{field} has no effect here: {unread.reason}. Leave it out")


def _names(field: str, fields: tuple[str, ...]) -> bool:
    return any(
        field.startswith(one) if one.endswith(".") else field == one or field.startswith(one + ".")
        for one in fields
    )
