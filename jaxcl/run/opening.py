"""The lines that a run prints when it starts or resumes, and when it ends."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxcl.data.prepare import RunData
from jaxcl.host.paths import AnyPath
from jaxcl.models.trainable import split
from jaxcl.run.best import Best, recorded_best, selection_of
from jaxcl.run.explicit_negatives import negatives_summary, negatives_warnings
from jaxcl.run.memory import tiers_left_empty
from jaxcl.run.sentence_transformers import why_no_equivalent
from jaxcl.run.training import Training
from jaxcl.settings.derived import BEST, CHECKPOINTS, schedule_warnings, tower_sections
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState

__all__ = ["closing", "opening", "run_warnings"]


def opening(
    training: Training, data: RunData, workdir: AnyPath, state: TrainState, best: Best | None
) -> str:
    """Describe a run, and the step from which it starts or resumes, in one line.

    Args:
      training: the functions of the run.
      data: the splits of the run.
      workdir: the folder of the run.
      state: the current state.
      best: the best evaluation so far.
    """
    settings, step = training.settings, int(state.step)
    start = f"resumes from step {step}" if step else "starts"
    if step >= settings.steps:
        start = f"has completed its {step} steps, and is evaluated"
    elif best is not None and selection_of(settings).stops(best):
        start = (
            f"has stopped early after {step} steps, and is evaluated: {_wait(best, settings)}; set "
            "a larger evaluation.patience to continue it"
        )
    return (
        f"{workdir}: {start}. {_encoder_names(settings)}, {_parameters(training, state)}, "
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


def closing(settings: Settings, workdir: AnyPath, step: int, best: Best | None) -> Iterator[str]:
    """Yield the closing messages of a run: its best step, and the commands that use the run.

    Args:
      settings: the settings of the run.
      workdir: the folder of the run.
      step: number of completed steps.
      best: the best evaluation so far; `None` if the run does not keep its best checkpoint.
    """
    if best is not None:
        yield _best_step(settings, workdir, step, best)
    query = "QUERY" if "text" in settings.data.modality else "--image FILE"
    form = "" if why_no_equivalent(settings) is None else " --format jaxcl"
    yield (
        f"the run is in {workdir}; search with python -m jaxcl.search --workdir {workdir} {query}, "
        f"measure it with python -m jaxcl.evaluate --model {workdir}, or export it with "
        f"python -m jaxcl.export --workdir {workdir} --to FOLDER{form}"
    )


def _best_step(settings: Settings, workdir: AnyPath, step: int, best: Best) -> str:
    reason = ""
    if step < settings.steps:
        reason = f"stopped early after {step} of {settings.steps} steps: {_wait(best, settings)}; "
    if best.step is None:
        return f"{reason}no evaluation had a finite {best.metric}, so there is no best step"
    return (
        f"{reason}the best step is {best.step}, with {best.metric} = {best.value:.4f}: "
        f"{workdir / CHECKPOINTS / BEST}"
    )


def _wait(best: Best, settings: Settings) -> str:
    """The reason why a run stops early."""
    return (
        f"{best.metric} has not increased by more than {settings.evaluation.min_delta:g} in "
        f"{best.waited} evaluations"
    )


def run_warnings(
    settings: Settings, data: RunData, record: Mapping[str, Any], best: Best | None
) -> Iterator[str]:
    """Yield warnings about the settings and about the best checkpoint.

    Args:
      settings: the settings of the run.
      data: the splits of the run.
      record: the record of the checkpoint from which the run resumes; empty for a new run.
      best: the best evaluation so far.
    """
    for tier in tiers_left_empty(settings, data.tables["train"].num_rows):
        yield (
            f"negatives.tiers.{tier} has no effect, since negatives.tiers.uniform draws the whole "
            "bank"
        )
    yield from negatives_warnings(settings, data.negatives)
    yield from schedule_warnings(settings.optimizer, steps=settings.steps)
    if (every := settings.optimizer.accumulate_steps) > 1:
        yield (
            f"optimizer.accumulate_steps={every} averages the gradients of {every} batches and "
            f"adds no negatives: each batch is still compared with its own "
            f"{settings.global_batch_size:,} rows. For more negatives in the same memory, use a "
            "larger global_batch_size with grad_cache.chunk_size"
        )
    for section, model in settings.parts.pretrained.items():
        if model.similarity != "cosine" and not model.normalize:
            yield (
                f"the model of {section}.pretrained has similarity {model.similarity} and vectors "
                "of any norm, but this run trains it with unit vectors"
            )
    before = recorded_best(record)
    if before is None or before.step is None:
        return
    if best is None or best.metric != before.metric:
        yield (
            f"evaluation.best_metric was {before.metric!r} and is now "
            f"{settings.evaluation.best_metric!r}: the best checkpoint, of step {before.step}, is "
            "kept only until newer ones are saved"
        )
    elif best.step is None:
        yield (
            f"the best checkpoint, of step {before.step} with {before.metric} = "
            f"{before.value:.4f}, is missing; the next evaluation replaces it"
        )


def _encoder_names(settings: Settings) -> str:
    """The names of the encoders, or their families if they are pretrained."""
    pretrained = settings.parts.pretrained
    names = {"model": settings.model.name, "model.key": settings.model.key.name}
    sections = dict.fromkeys(tower_sections(settings.model).values())
    return " and ".join(
        f"pretrained {pretrained[section].family}" if section in pretrained else str(names[section])
        for section in sections
    )
