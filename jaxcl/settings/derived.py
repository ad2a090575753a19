"""Values derived from settings: the assignment rule, the names of data sets and masks."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxcl.assignment import PRESETS, Gcbs, random_to_hard
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import counted
from jaxcl.settings.data_sections import DataSet, DataSettings
from jaxcl.settings.parts import SCHEDULE_FIELDS
from jaxcl.settings.sections import GcbsSettings, ModelSettings, OptimizerSettings, Parts, Settings
from jaxcl.typing import SIDES

__all__ = [
    "ASSIGNMENTS",
    "BANKS",
    "BEST",
    "CHECKPOINTS",
    "DIRECTIONS",
    "EMBEDDINGS",
    "GUIDES",
    "MASKS",
    "SOURCES",
    "GcbsRule",
    "cut_sides",
    "data_set_names",
    "data_sets_of",
    "gcbs_rule",
    "has_only_texts",
    "learning_rate_of",
    "origin_of",
    "ranking_directions",
    "ranking_methods",
    "schedule_warnings",
    "shows_sheets",
    "sources_by",
    "tower_sections",
    "with_encoder_options",
]

ASSIGNMENTS = ("uniform", "one_per_query", "sourced", "gcbs")
"""The values of `config.assignment.name`."""

BEST = "best"
"""The name in `WORKDIR/checkpoints/best`, for the checkpoint with the highest
`config.evaluation.best_metric`. There is no folder of this name."""

BANKS = ("queue", "instance")
"""The memory banks: the values of `config.negatives.bank.kind`."""

CHECKPOINTS = "checkpoints"
"""The folder of a workdir that holds its checkpoints."""

EMBEDDINGS = ("encode", "bank")
"""Where a refresh of the batches takes embeddings from: a pass over the data, or the bank."""

DIRECTIONS = ("query_to_key", "key_to_query")
"""The values of `config.evaluation.directions`."""

GUIDES = ("momentum", "data")
"""The values of `config.negatives.guide`: models to whose similarities the margins apply."""

MASKS: Mapping[str, str] = {"row": "ids", "text": "ids", "group": "groups"}
"""Column of a batch -> the loss's argument for it. Rows with equal entries are not each other's
negatives. A row shares its text with itself, so `"text"` masks everything that `"row"` masks."""

SOURCES = ("group", "data_set", "topic")
"""The values of `config.assignment.sourced.by`."""


class GcbsRule(NamedTuple):
    """The settings with which a run reassigns its batches.

    Attributes:
      settings: the settings of the method.
      block_size: number of rows in a block.
      refresh_every: number of steps between refreshes.
      refresh_epochs: number of epochs between refreshes, instead of steps; or `None`.
      random_fraction: step -> the fraction of blocks that are shuffled.
      keep_apart: columns; rows with equal entries in any of them never share a batch.
      from_bank: whether embeddings come from the instance bank.
      picture: whether each refresh draws the similarity matrix.
    """

    settings: Gcbs
    block_size: int
    refresh_every: int
    refresh_epochs: float | None
    random_fraction: Callable[[int], float]
    keep_apart: tuple[str, ...]
    from_bank: bool
    picture: bool


def learning_rate_of(
    settings: OptimizerSettings, parts: Parts, *, steps: int
) -> Callable[[Any], Any]:
    """The learning rate as a function of the step.

    `warmup_steps=None` and `decay_steps=None` stand for a tenth of the steps.
    """
    values = {
        "warmup_steps": steps // 10 if settings.warmup_steps is None else settings.warmup_steps,
        "decay_steps": steps // 10 if settings.decay_steps is None else settings.decay_steps,
        "final_rate": settings.final_rate,
    }
    fields = SCHEDULE_FIELDS.get(settings.schedule, ("warmup_steps",))
    read = {name: values[name] for name in fields}
    return parts.schedule(settings.learning_rate, steps=steps, **read)


def schedule_warnings(settings: OptimizerSettings, *, steps: int) -> Iterator[str]:
    """Yield a warning for a warmup or a decay that does not fit into the steps of a run."""
    fields = SCHEDULE_FIELDS.get(settings.schedule, ())
    warmup = settings.warmup_steps if "warmup_steps" in fields else None
    decay = settings.decay_steps if "decay_steps" in fields else None
    if decay is not None and decay > steps:
        yield (
            f"optimizer.decay_steps={decay} is more than the run's {counted(steps, 'step')}, so "
            "the learning rate decays from the first step"
        )
    if warmup is None:
        return
    if settings.schedule == "warmup_constant":
        if warmup >= steps:
            yield (
                f"optimizer.warmup_steps={warmup} is not less than the run's "
                f"{counted(steps, 'step')}, so the learning rate never reaches its peak"
            )
        return
    if "decay_steps" in fields:
        longest = steps - min(steps // 10 if decay is None else decay, steps)
    else:
        longest = steps - 1
    if warmup > longest:
        yield (
            f"optimizer.warmup_steps={warmup} does not fit into the run's "
            f"{counted(steps, 'step')}, so the warmup is shortened to {longest}"
        )


def gcbs_rule(settings: Settings) -> GcbsRule | None:
    """The settings with which a run reassigns its batches; `None` if it does not."""
    if settings.assignment.name != "gcbs":
        return None
    options = settings.assignment.gcbs
    return GcbsRule(
        _method(options),
        settings.global_batch_size if options.block_size is None else options.block_size,
        options.refresh_every,
        options.refresh_epochs,
        random_to_hard(options.random_initial, options.random_final, settings.steps),
        options.keep_apart,
        options.embeddings == "bank",
        options.picture,
    )


def _method(options: GcbsSettings) -> Gcbs:
    if options.preset not in PRESETS:
        raise ValueError(
            f"assignment.gcbs.preset={options.preset!r} is unknown; use one of {', '.join(PRESETS)}"
        )
    preset = PRESETS[options.preset]

    def given(*names: str) -> dict:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    return preset._replace(
        **given("method", "graph", "neighbours", "similarity_cap"),
        effort=preset.effort._replace(**given("starts", "walks", "swaps", "refinements")),
    )


def sources_by(settings: Settings) -> str:
    """The label that defines a source for `assignment.name="sourced"`.

    By default, this is the group, or the data set if there are several and rows have no groups.
    """
    without_groups = settings.data.group_field is None and len(data_set_names(settings.data)) > 1
    return settings.assignment.sourced.by or ("data_set" if without_groups else "group")


def data_set_names(data: DataSettings) -> tuple[str, ...]:
    """The names of the training rows' data sets, in order: `"first"`, then the others."""
    others = sorted(data.concatenated.items())
    return ("first", *(name for name, one in others if "train" in one.splits))


def data_sets_of(data: DataSettings, role: str) -> dict[str, DataSet]:
    """The data sets that have rows for a role, by the setting that names them, in order."""
    named = {"data": data.first}
    named |= {f"data.concatenated.{name}": one for name, one in sorted(data.concatenated.items())}
    return {setting: one for setting, one in named.items() if role in one.splits}


def tower_sections(model: ModelSettings) -> dict[str, str]:
    """Map the name of each tower to the section of the config that describes its encoder.

    Example:
      >>> tower_sections(ModelSettings()), tower_sections(ModelSettings(shared=False))
      ({'both': 'model'}, {'query': 'model', 'key': 'model'})
    """
    if model.shared:
        return {"both": "model"}
    return {"query": "model", "key": "model" if model.key.name is None else "model.key"}


def cut_sides(settings: Settings) -> tuple[str, ...]:
    """The sides whose texts may be padded to any width: their encoders declare `any_width`."""
    sections = tower_sections(settings.model)
    return tuple(
        side
        for side in SIDES
        if getattr(settings.data.modality, side) == "text"
        and settings.parts.encoders[sections.get(side, "model")].any_width
    )


def origin_of(path: str | os.PathLike[str]) -> tuple[AnyPath, int | str | None]:
    """Split a path into a workdir and one of its checkpoints.

    Args:
      path: a workdir, `WORKDIR/checkpoints/STEP` or `WORKDIR/checkpoints/best`.

    Returns:
      The workdir, and the step, `BEST`, or None for the newest checkpoint.
    """
    path = as_path(path)
    if path.parent.name != CHECKPOINTS:
        return path, None
    if path.name.isdigit():
        return path.parent.parent, int(path.name)
    return (path.parent.parent, BEST) if path.name == BEST else (path, None)


def with_encoder_options(
    settings: Settings, change: Callable[[Mapping[str, Any], tuple[str, ...]], dict[str, Any]]
) -> Settings:
    """The settings with changed options of the encoders.

    Args:
      settings: the settings of the run.
      change: (the options that are set, the names of all options that the encoder declares) -> the
        options to use.
    """
    model, encoders = settings.model, settings.parts.encoders

    def changed(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
        declared: Any = encoders[section].options
        return change(options, () if declared is None else declared._fields)

    model = model._replace(options=changed("model", model.options))
    if model.key.name is not None:
        own = changed("model.key", model.key.options)
        model = model._replace(key=model.key._replace(options=own))
    return settings._replace(model=model)


def ranking_methods(settings: Settings) -> tuple[str, ...]:
    """The methods that rank held-out rows: by default, all for texts, and `"dense"` for others."""
    if settings.evaluation.methods is not None:
        return settings.evaluation.methods
    return ("bm25", "dense", "hybrid") if has_only_texts(settings.data) else ("dense",)


def ranking_directions(settings: Settings) -> tuple[str, ...]:
    """The directions of rankings of held-out rows: by default both, if the modalities differ."""
    if settings.evaluation.directions is not None:
        return settings.evaluation.directions
    both = len(set(settings.data.modality)) > 1
    return DIRECTIONS if both else DIRECTIONS[:1]


def has_only_texts(data: DataSettings) -> bool:
    """Whether both sides hold texts."""
    return set(data.modality) == {"text"}


def shows_sheets(settings: Settings) -> bool:
    """Whether a run writes sheets of its images: by default, if it has images."""
    if settings.run.sheets is not None:
        return settings.run.sheets
    return "image" in settings.data.modality
