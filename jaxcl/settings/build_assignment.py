"""From a config to the rule by which rows share a batch."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxcl.assignment import PRESETS, Gcbs, random_to_hard
from jaxcl.data.splits import data_set_names
from jaxcl.ops.row_tables import padded_entries
from jaxcl.typing import PyTree

__all__ = [
    "ASSIGNMENTS",
    "SOURCES",
    "GcbsRule",
    "assignment_memory",
    "assignment_name",
    "gcbs_rule",
    "sources_by",
    "unused_settings",
]

ASSIGNMENTS = ("uniform", "sourced", "gcbs")
"""What decides which rows share a batch, as `config.assignment.name`."""

EMBEDDINGS = ("encode", "bank")
"""Where a refresh takes embeddings from: a pass over the data, or the instance bank."""

SOURCES = ("group", "data_set", "topic")
"""What batches may be sourced by, as `config.assignment.sourced.by`."""

_APART = ("text", "group")


class GcbsRule(NamedTuple):
    """How a run chooses its batches anew.

    Attributes:
      settings: of the method.
      block_size: rows that stay together.
      refresh_every: steps between two refreshes; or
      refresh_epochs: epochs between them, if not `None`.
      random_fraction: step -> the share of blocks that are random.
      apart: the columns whose equals keep out of each other's batch.
      from_bank: whether embeddings are those of the instance bank.
      picture: whether each refresh draws one.
    """

    settings: Gcbs
    block_size: int
    refresh_every: int
    refresh_epochs: float | None
    random_fraction: Callable[[int], float]
    apart: tuple[str, ...]
    from_bank: bool
    picture: bool


def assignment_name(config: ConfigDict) -> str:
    """Which of `ASSIGNMENTS` a run uses.

    Raises:
      ValueError: for another.
    """
    name = config.assignment.name if "assignment" in config else "uniform"
    if name not in ASSIGNMENTS:
        raise ValueError(
            f"assignment.name={name!r} is unknown; use one of {', '.join(ASSIGNMENTS)}"
        )
    by = sources_by(config) if name == "sourced" else None
    if by != "topic" and config.data.get("topics") is not None:
        raise ValueError(
            "data.topics, but nobody goes by them; set assignment.name='sourced' and "
            "assignment.sourced.by='topic', or leave it None"
        )
    return name


def unused_settings(config: ConfigDict, given: Iterable[str]) -> list[str]:
    """Which of the given settings are those of another assignment than the run's."""
    others = [f"assignment.{name}." for name in ASSIGNMENTS if name != assignment_name(config)]
    return [setting for setting in given if setting.startswith(tuple(others))]


def sources_by(config: ConfigDict) -> str:
    """Which of `SOURCES` the batches of `assignment.name="sourced"` go by.

    Raises:
      ValueError: for another, or one that the data will not have.
    """
    by = config.assignment.sourced.get("by") or "group"
    if by not in SOURCES:
        raise ValueError(
            f"assignment.sourced.by={by!r} is unknown; use one of {', '.join(SOURCES)}"
        )
    needed = {
        "group": ("data.group_field", config.data.get("group_field")),
        "data_set": (
            "data.concatenated, with a split for 'train'",
            len(data_set_names(config.data)) > 1,
        ),
        "topic": ("data.topics, a file of `python -m jaxcl.topics`", config.data.get("topics")),
    }
    setting, given = needed[by]
    if not given:
        raise ValueError(
            f"assignment.name='sourced' goes by {by}; set {setting}, or assignment.sourced.by to "
            f"another of {', '.join(SOURCES)}"
        )
    return by


def gcbs_rule(config: ConfigDict) -> GcbsRule | None:
    """How a run chooses its batches anew; `None` if it does not.

    Raises:
      ValueError: for what cannot be.
    """
    if assignment_name(config) != "gcbs":
        return None
    options = config.assignment.gcbs
    block_size = options.block_size
    if block_size is None:
        block_size = config.global_batch_size
    if block_size < 2 or config.global_batch_size % block_size:
        raise ValueError(
            f"assignment.gcbs.block_size={block_size} does not divide "
            f"global_batch_size={config.global_batch_size} into blocks of at least 2 rows; use a "
            "divisor of it"
        )
    if options.embeddings not in EMBEDDINGS:
        raise ValueError(
            f"assignment.gcbs.embeddings={options.embeddings!r} is unknown; use one of "
            f"{', '.join(EMBEDDINGS)}"
        )
    from_bank = options.embeddings == "bank"
    if from_bank and config.negatives.bank.kind != "instance":
        raise ValueError(
            "assignment.gcbs.embeddings='bank' reads a slot for each training row; set "
            "negatives.bank.kind='instance'"
        )
    if unknown := set(options.apart) - set(_APART):
        raise ValueError(
            f"assignment.gcbs.apart names {', '.join(sorted(unknown))}; use {', '.join(_APART)}"
        )
    if "group" in options.apart and config.data.get("group_field") is None:
        raise ValueError("assignment.gcbs.apart names 'group', but data.group_field is None")
    settings = _settings(options)
    try:
        settings.check()
        fraction = random_to_hard(options.random_initial, options.random_final, config.steps)
    except ValueError as error:
        raise ValueError(f"assignment.gcbs: {error}") from error
    # Names first: who tries a setting in a short run is told of that before of the length.
    epochs = options.get("refresh_epochs")
    if epochs is not None and not 0 < epochs < float("inf"):
        raise ValueError(f"assignment.gcbs.refresh_epochs={epochs}; it is above 0")
    if epochs is None and not 1 <= options.refresh_every < config.steps:
        raise ValueError(
            f"assignment.gcbs.refresh_every={options.refresh_every} never comes in {config.steps} "
            "steps; set it to a step before the last, or train longer"
        )
    return GcbsRule(
        settings,
        block_size,
        options.refresh_every,
        epochs,
        fraction,
        tuple(options.apart),
        from_bank,
        options.picture,
    )


def _settings(options: ConfigDict) -> Gcbs:
    named = options.get("preset")
    if named not in (None, *PRESETS):
        raise ValueError(
            f"assignment.gcbs.preset={named!r} is unknown; use one of {', '.join(PRESETS)}"
        )
    preset = PRESETS[named or "full"]  # configs of before named none
    given = {name: value for name, value in options.items() if value is not None}
    effort = {name: given[name] for name in ("swaps", "refinements") if name in given}
    shared = ("method", "graph", "neighbours", "similarity_cap")
    return preset._replace(
        **{name: given[name] for name in shared if name in given},
        effort=preset.effort._replace(**effort),
    )


def assignment_memory(config: ConfigDict, num_rows: int | None) -> dict[str, PyTree]:
    """What a run of so many training rows keeps of its batches: no order yet."""
    if gcbs_rule(config) is None:
        return {}
    if num_rows is None:
        raise ValueError("batches are chosen among the training rows; give the number of them")
    entries = padded_entries(num_rows)
    assigned = {
        "order": jnp.full(entries, -1, jnp.int32),
        "seen": jnp.zeros(entries, bool),
        "step": jnp.int32(-1),
    }
    return {"assignment": assigned}
