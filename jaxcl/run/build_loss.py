"""From settings to the loss of a batch, and to the measurement of its negatives."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcl.grad_cache import rows_per_chunk
from jaxcl.losses import matryoshka
from jaxcl.losses.negative_metrics import measure_negatives
from jaxcl.models.towers import Towers
from jaxcl.negatives.memory_bank import MemoryBank, update_instances, update_queue
from jaxcl.settings.derived import MASKS, gcbs_rule
from jaxcl.settings.parts import MEMORIES, arguments_of
from jaxcl.settings.sections import BankSettings, Settings
from jaxcl.step.batch_loss import (
    BeyondBatch,
    LossOfBatch,
    MeasureOfBatch,
    make_loss,
    make_measure,
)
from jaxcl.typing import SIDES, Scalar

__all__ = ["batch_needs", "beyond_batch", "build_loss", "build_measure", "build_momentum"]


def build_loss(settings: Settings, towers: Towers, mesh: Mesh) -> LossOfBatch:
    """The loss of `settings.loss`, encoded as `settings.grad_cache` says: see `make_loss`."""
    return make_loss(
        towers.encode,
        _loss_fn(settings),
        mesh,
        remembers=settings.parts.loss in MEMORIES,
        **_arrangement(settings),
    )


def build_measure(settings: Settings, towers: Towers, mesh: Mesh) -> MeasureOfBatch:
    """What that loss's negatives are: see `make_measure`."""
    known = arguments_of(measure_negatives)
    options = {
        name: value
        for name, value in {**settings.loss.options, **_arguments(settings)}.items()
        if name in known
    }
    measure_fn = functools.partial(measure_negatives, **options)
    return make_measure(towers.encode, measure_fn, mesh, **_arrangement(settings))


def batch_needs(settings: Settings) -> tuple[str, ...]:
    """What a batch must hold in addition to its pairs, rows and groups."""
    mines = settings.negatives.mined.refresh_every is not None
    needed = {
        "negatives": settings.data.negatives is not None or mines,
        "teacher_scores": "teacher_scores" in arguments_of(settings.parts.loss),
        "guides": settings.data.guides is not None,
    }
    return tuple(column for column, wanted in needed.items() if wanted)


def beyond_batch(settings: Settings) -> BeyondBatch:
    """The negatives of `settings.negatives`."""
    negatives = settings.negatives
    kind, tiers = negatives.bank.kind, negatives.tiers.budgets
    rule = gcbs_rule(settings)
    sides: tuple[str, ...] = () if kind is None else ("key",)
    if negatives.mined.refresh_every is not None or (rule is not None and rule.from_bank):
        sides = SIDES
    return BeyondBatch(
        tiers._replace(whole=tiers.whole and kind is not None),
        dict.fromkeys(sides, _bank_update(negatives.bank)),
        negatives.guide,
        settings.loss.margins,
    )


def build_momentum(settings: Settings) -> Callable[[Scalar], Scalar] | None:
    """Step -> the share of the momentum encoder that an update keeps; `None` without one.

    It rises from the initial to the final value along a cosine, as in Grill et al., "Bootstrap Your
    Own Latent", 2020.
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
        "masks": {MASKS[one]: one for one in MASKS if one in settings.loss.masks},
        "chunk_sizes": _chunk_sizes(settings),
        "beyond": beyond_batch(settings),
        "needs": batch_needs(settings),
    }


def _loss_fn(settings: Settings) -> Callable:
    loss = settings.loss
    arguments = {**loss.options, **_arguments(settings)}
    if settings.parts.loss in MEMORIES:
        arguments["temperature_bounds"] = (loss.temperature.minimum, loss.temperature.maximum)
    loss_fn = functools.partial(settings.parts.loss, **arguments)
    return matryoshka(loss_fn, dims=loss.matryoshka_dims) if loss.matryoshka_dims else loss_fn


def _arguments(settings: Settings) -> dict[str, Any]:
    """What the settings say to every loss, where they say anything."""
    loss = settings.loss
    given = {"exchange": loss.exchange, "implementation": loss.implementation}
    return {name: value for name, value in given.items() if value is not None} | loss.margins


def _chunk_sizes(settings: Settings) -> dict[str, int] | None:
    """How many of a device's rows are encoded at a time, by side; `None` for all."""
    size, tokens = settings.grad_cache
    if size is not None:
        return dict.fromkeys(SIDES, size)
    if tokens is not None:
        widths = settings.data.max_tokens._asdict()
        return {side: rows_per_chunk(width, max_tokens=tokens) for side, width in widths.items()}
    return None


def _bank_update(bank: BankSettings) -> Callable[..., MemoryBank]:
    """`(bank, vectors, rows, ids, groups, guides) -> bank`."""
    if bank.kind == "instance":
        return lambda old, vectors, rows, ids, groups, guides: update_instances(
            old, vectors, rows, groups, momentum=bank.momentum, ids=ids, guides=guides
        )
    return lambda old, vectors, rows, ids, groups, guides: update_queue(
        old, vectors, ids, groups, num_slots=bank.slots, guides=guides
    )
