"""Build the loss of a batch, and the metrics of its negatives, from settings."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcl.data.modalities import modality_of
from jaxcl.data.row_guides import guide_dim
from jaxcl.grad_cache import rows_per_chunk
from jaxcl.losses import Loss, measure_negatives
from jaxcl.losses.matryoshka import nested
from jaxcl.models.towers import Towers
from jaxcl.negatives.memory_bank import MemoryBank, update_instances, update_queue
from jaxcl.settings.derived import MASKS, gcbs_rule
from jaxcl.settings.sections import BankSettings, Settings
from jaxcl.step.batch_loss import (
    BeyondBatch,
    LossOfBatch,
    MeasureOfBatch,
    make_loss,
    make_measure,
)
from jaxcl.step.length_buckets import Buckets
from jaxcl.typing import SIDES, Scalar

__all__ = [
    "batch_needs",
    "beyond_batch",
    "build_loss",
    "build_measure",
    "build_momentum",
    "check_teacher_dim",
    "run_loss",
]


def build_loss(
    settings: Settings, towers: Towers, mesh: Mesh, buckets: Mapping[str, Buckets] | None = None
) -> LossOfBatch:
    """Build the loss of `settings.loss`, with the gradient cache of `settings.grad_cache`.

    See `make_loss`.
    """
    return make_loss(towers, run_loss(settings), mesh, buckets=buckets, **_arrangement(settings))


def build_measure(settings: Settings, towers: Towers, mesh: Mesh) -> MeasureOfBatch:
    """Build the metrics of the negatives in the loss of `settings`; see `make_measure`."""
    options = {
        name: value
        for name, value in settings.loss.options.items()
        if name in ("hardness", "negative_hardness")
    }
    return make_measure(
        towers,
        settings.parts.loss,
        mesh,
        measure_fn=functools.partial(measure_negatives, **options, **_exchange(settings)),
        **_arrangement(settings),
    )


def run_loss(settings: Settings) -> Loss:
    """The loss of `settings.loss` with its options bound."""
    loss, section = settings.parts.loss, settings.loss
    arguments = dict(section.options)
    if loss.exchanges and loss.multiplies:
        arguments |= _exchange(settings)
    if loss.bounds_temperature:
        arguments["temperature_bounds"] = (section.temperature.minimum, section.temperature.maximum)
    bound = loss._replace(function=functools.partial(loss.function, **arguments))
    return nested(bound, dims=section.matryoshka_dims) if section.matryoshka_dims else bound


def batch_needs(settings: Settings) -> tuple[str, ...]:
    """The columns that a batch must have in addition to its pairs, rows and groups.

    If the training rows have negatives as texts, batches have `"negatives"` without any setting.
    """
    data, mines = settings.data, settings.negatives.mined.refresh_every is not None
    scored = "teacher_scores" in settings.parts.loss.columns.values()
    needed = {
        "negatives": data.negatives is not None or bool(data.negatives_per_row) or mines or scored,
        "teacher_scores": scored,
        "guides": data.guides is not None,
    }
    return tuple(column for column, wanted in needed.items() if wanted)


def check_teacher_dim(settings: Settings) -> None:
    """Raise a `ValueError` if a teacher's embeddings do not fit `"embedding_distillation"`.

    Only the header of `data.guides` is read, so that a run fails before it prepares its data.
    """
    loss, guides = settings.loss, settings.data.guides
    if loss.name != "embedding_distillation" or guides is None:
        return
    width = guide_dim(guides)
    for dim in {*loss.matryoshka_dims, settings.model.dim}:
        if dim == width or (loss.options.get("truncate_teacher") and dim < width):
            continue
        advice = f"use a model with {width} features"
        if dim < width:
            advice += ", or set loss.options.truncate_teacher to use the teacher's first features"
        raise ValueError(
            f"data.guides={guides} has embeddings with {width} features, and the model's have "
            f"{dim}; {advice}"
        )


def beyond_batch(settings: Settings) -> BeyondBatch:
    """The negatives of `settings.negatives` from outside the batch."""
    negatives = settings.negatives
    kind, tiers = negatives.bank.kind, negatives.tiers
    rule = gcbs_rule(settings)
    sides: tuple[str, ...] = () if kind is None else ("key",)
    if negatives.mined.refresh_every is not None or (rule is not None and rule.from_bank):
        sides = SIDES
    return BeyondBatch(
        tiers._replace(full_bank=tiers.full_bank and kind is not None),
        dict.fromkeys(sides, _bank_update(negatives.bank)),
        negatives.guide,
        settings.loss.margins,
    )


def build_momentum(settings: Settings) -> Callable[[Scalar], Scalar] | None:
    """Build the momentum encoder's decay schedule, or return `None` if there is no such encoder.

    The decay rises from the initial to the final value along a cosine.

    Reference:
      Grill et al., "Bootstrap Your Own Latent", 2020.
    """
    initial, final = settings.negatives.momentum_encoder
    if initial is None:
        return None
    last = max(settings.steps - 1, 1)
    return lambda step: (
        final - (final - initial) * (1 + jnp.cos(jnp.pi * jnp.minimum(step / last, 1))) / 2
    )


def _arrangement(settings: Settings) -> dict[str, Any]:
    return {
        "masks": {MASKS[mask]: mask for mask in MASKS if mask in settings.loss.masks},
        "chunk_sizes": _chunk_sizes(settings),
        "beyond": beyond_batch(settings),
        "needs": batch_needs(settings),
    }


def _exchange(settings: Settings) -> dict[str, Any]:
    """The options of the loss for exchanging rows between devices, as far as they are set."""
    loss = settings.loss
    options = {"exchange": loss.exchange, "implementation": loss.implementation}
    return {name: value for name, value in options.items() if value is not None}


def _chunk_sizes(settings: Settings) -> dict[str, int] | None:
    """The number of rows per device to encode at a time, by side; `None` for all rows."""
    size, tokens, _ = settings.grad_cache
    if size is not None:
        return dict.fromkeys(SIDES, size)
    if tokens is not None:
        data = settings.data
        lengths = {side: modality_of(data, side).length(data, side) for side in SIDES}
        return {side: rows_per_chunk(width, max_tokens=tokens) for side, width in lengths.items()}
    return None


def _bank_update(bank: BankSettings) -> Callable[..., MemoryBank]:
    """Build the update `(bank, vectors, rows, ids, groups, guides) -> bank`."""
    if bank.kind == "instance":
        return lambda old, vectors, rows, ids, groups, guides: update_instances(
            old, vectors, rows, groups, momentum=bank.momentum, ids=ids, guides=guides
        )
    return lambda old, vectors, rows, ids, groups, guides: update_queue(
        old, vectors, ids, groups, num_slots=bank.slots, guides=guides
    )
