"""The lines that a run prints when it begins or resumes, and when it ends."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxcl.data.prepare import RunData
from jaxcl.host.paths import AnyPath
from jaxcl.models.trainable import split
from jaxcl.run.best import Best, recorded_best, selection_of
from jaxcl.run.explicit_negatives import negatives_summary, negatives_warnings
from jaxcl.run.memory import tiers_left_empty
from jaxcl.run.training import Training
from jaxcl.settings.derived import BEST, CHECKPOINTS, tower_sections
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState

__all__ = ["closing", "opening", "run_warnings"]


def opening(
    training: Training, data: RunData, workdir: AnyPath, state: TrainState, best: Best | None
) -> str:
    """The line that describes a run and where it begins.

    Args:
      training: the run's.
      data: its splits.
      workdir: its folder.
      state: its state.
      best: its evaluations so far.
    """
    settings, step = training.settings, int(state.step)
    begins = f"goes on from step {step}" if step else "begins"
    if step >= settings.steps:
        begins = f"has made its {step} steps, and is evaluated"
    elif best is not None and selection_of(settings).stops(best):
        begins = (
            f"has stopped early after {step} steps, and is evaluated: "
            f"{_wait(best, settings)}; a larger evaluation.patience continues it"
        )
    return (
        f"{workdir}: {begins}. {_encoder_names(settings)}, {_parameters(training, state)}, "
        f"{training.mesh.size} × {jax.devices()[0].device_kind} as "
        f"{dict(training.mesh.shape)}; pairs: "
        + ", ".join(f"{table.num_rows:,} {role}" for role, table in data.tables.items())
        + negatives_summary(data.negatives)
    )


def _parameters(training: Training, state: TrainState) -> str:
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(part))
        for part in split(state.params, training.frozen)
    )
    return f"{trained + frozen:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")


def closing(settings: Settings, workdir: AnyPath, step: int, best: Best) -> str:
    """The closing message of a run that keeps its best checkpoint.

    Args:
      settings: the run's.
      workdir: its folder.
      step: the number of steps trained.
      best: the best evaluation so far.
    """
    ended = ""
    if step < settings.steps:
        ended = f"stopped early after {step} of {settings.steps} steps: {_wait(best, settings)}; "
    if best.step is None:
        return f"{ended}no evaluation had a finite {best.metric}, so that there is no best step"
    return (
        f"{ended}the best step is {best.step}, with {best.metric} = {best.value:.4f}: "
        f"{workdir / CHECKPOINTS / BEST}"
    )


def _wait(best: Best, settings: Settings) -> str:
    """Why a run stops early."""
    return (
        f"{best.metric} has not increased by more than {settings.evaluation.min_delta:g} in "
        f"{best.waited} evaluations"
    )


def run_warnings(
    settings: Settings, data: RunData, record: Mapping[str, Any], best: Best | None
) -> Iterator[str]:
    """Warnings about settings and about the best checkpoint.

    Args:
      settings: the run's.
      data: its splits.
      record: the record of the checkpoint that it resumes from; empty for a new run.
      best: its evaluations so far.
    """
    for tier in tiers_left_empty(settings, data.tables["train"].num_rows):
        yield f"negatives.tiers.uniform draws all of the bank, none for {tier}"
    yield from negatives_warnings(settings, data.negatives)
    for section, model in settings.parts.pretrained.items():
        if model.similarity != "cosine" and not model.normalize:
            yield (
                f"the model of {section}.pretrained has similarity {model.similarity} and vectors "
                "of any norm; this run trains it to output unit vectors"
            )
    before = recorded_best(record)
    if before is None or before.step is None:
        return
    if best is None or best.metric != before.metric:
        yield (
            f"evaluation.best_metric was {before.metric!r} and is "
            f"{settings.evaluation.best_metric!r}: the best checkpoint, of step {before.step}, "
            "stays only until newer ones are saved"
        )
    elif best.step is None:
        yield (
            f"the best checkpoint, of step {before.step} with {before.metric} = "
            f"{before.value:.4f}, is gone; the next evaluation takes its place"
        )


def _encoder_names(settings: Settings) -> str:
    """The name of the encoder, or of both sides' encoders; the family of a pretrained one."""
    read = settings.parts.pretrained
    named = {"model": settings.model.name, "model.key": settings.model.key.name}
    sections = dict.fromkeys(tower_sections(settings.model).values())
    return " and ".join(
        f"pretrained {read[section].family}" if section in read else str(named[section])
        for section in sections
    )
