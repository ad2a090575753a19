"""Start a run from the encoders of another run (`config.init_from`) or of a pretrained model."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.data.modalities import MODALITIES
from jaxcl.host.files import read_regular, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.models.lora import Lora, with_base, without_adapters
from jaxcl.models.pretrained.weights import keep_copy
from jaxcl.models.trainable import split
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.checkpoint_record import newest_record
from jaxcl.run.identity import migrated
from jaxcl.run.training import build_towers
from jaxcl.settings.derived import BEST, CHECKPOINTS, origin_of
from jaxcl.settings.pretrained import COPIES, is_copy, tokenizer_of
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.step.average import init_average
from jaxcl.step.train_state import TrainState

__all__ = ["copy_prepared_files", "keep_pretrained_files", "with_initial_towers"]

_MAX_BYTES = 2**30
"""The largest allowed size of a file that the inputs depend on."""


def copy_prepared_files(settings: Settings, workdir: AnyPath) -> None:
    """Copy the files that the inputs depend on, such as the tokenizer, from the other run.

    A resumed run uses its copies, and no longer needs the other run.

    Raises:
      ValueError: if there is no such run, it has no such files, or the `workdir` of a new run
        already has different files.
    """
    if settings.init_from is None or newest_record(workdir / CHECKPOINTS) is not None:
        return
    origin, _ = origin_of(settings.init_from)
    for name in {settings.data.modality.query, settings.data.modality.key}:
        for file in MODALITIES[name].files:
            if not (origin / file).exists():
                raise ValueError(
                    f"init_from={settings.init_from!r}: there is no {file} in {origin}; give the "
                    "workdir of a run that has saved a checkpoint, or one of its checkpoints"
                )
            content = read_regular(origin / file, limit=_MAX_BYTES)
            if not (workdir / file).exists():
                write_whole(workdir / file, content)
            elif read_regular(workdir / file, limit=_MAX_BYTES) != content:
                raise ValueError(
                    f"init_from={settings.init_from!r}: {workdir / file} differs from the one in "
                    f"{origin}, whose encoders were trained with it; remove it, or give another "
                    "workdir"
                )


def keep_pretrained_files(settings: Settings, workdir: AnyPath) -> None:
    """Copy the files of the pretrained models, without their weights, into the workdir.

    Their tokenizer becomes the tokenizer of the run. A resumed run reads these copies, and no
    longer needs the original folders.

    Raises:
      ValueError: if the `workdir` of a new run already has a different tokenizer, or a folder of
        the user with the name of a copy.
    """
    models = settings.parts.pretrained
    if not models or newest_record(workdir / CHECKPOINTS) is not None:
        return
    if jax.process_index() == 0:
        for section, model in models.items():
            copy = workdir / COPIES[section]
            if copy.exists() and not is_copy(copy):
                raise ValueError(
                    f"{copy} already exists, where the run keeps a copy of its pretrained model; "
                    "move it, or choose another --workdir"
                )
            keep_copy(model, copy)
    texts = [model for model in models.values() if model.modality == "text"]
    if settings.init_from is None and texts:
        (file,) = MODALITIES["text"].files
        content = tokenizer_of(texts[0])
        if not (workdir / file).exists():
            write_whole(workdir / file, content)
        elif read_regular(workdir / file, limit=_MAX_BYTES) != content:
            raise ValueError(
                f"{workdir / file} differs from the tokenizer of the pretrained model; remove it, "
                "or choose another --workdir"
            )


def with_initial_towers(
    settings: Settings, state: TrainState, *, frozen: Collection[str] = ()
) -> TrainState:
    """Put the encoders of the run in `settings.init_from` into the state of a new run.

    The temperature, the optimizer and the memory keep their initial values; a momentum encoder and
    an average of the weights become copies of the encoders. Adapters keep their initial values,
    too, unless the other run has adapters.

    Args:
      settings: the settings of the new run.
      state: the state of the new run before its first update.
      frozen: the paths of the parameters that are not trained.

    Raises:
      ValueError: if there is no such run, or that run's encoders have different parameters.
      CheckpointError: if its checkpoint cannot be read.
    """
    if settings.init_from is None:
        return state
    origin, checkpoint = origin_of(settings.init_from)
    record = newest_record(origin / CHECKPOINTS)
    if record is None:
        raise ValueError(
            f"init_from={settings.init_from!r}: no run has saved a checkpoint in {origin}; give "
            "the workdir of one that has"
        )
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        state.params["towers"],
    )
    if _adds_adapters(settings, record):
        abstract = without_adapters(abstract)
    with Checkpoints(origin / CHECKPOINTS, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(
            {"params": {"towers": abstract}},
            partial=True,
            only=checkpoint if isinstance(checkpoint, int) else None,
            best=checkpoint == BEST,
            check=functools.partial(_check_same_parameters, settings, origin),
        )
    assert restored is not None  # since there is a record
    towers = with_base(state.params["towers"], restored.state["params"]["towers"])
    memory = dict(state.memory)
    # Copies, since the state is donated as a whole.
    trained = split({"towers": towers}, frozen)[0].get("towers", {})
    if "momentum" in memory:
        memory["momentum"] = jax.tree.map(jnp.copy, trained)
    if "average" in memory:
        memory["average"] = init_average(trained)
    return state._replace(params=state.params | {"towers": towers}, memory=memory)


def _adds_adapters(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Whether the new run has adapters and the run of the record has none."""
    lora = record.get("settings", {}).get("model", {}).get("lora", {})
    return settings.model.lora.rank is not None and lora.get("rank") is None


def _check_same_parameters(settings: Settings, origin: AnyPath, record: Mapping[str, Any]) -> None:
    model = settings.model
    # The config of the other run may name code; only packages that this run names are imported.
    names = {str(name).partition(":")[0].partition(".")[0] for name in (model.name, model.key.name)}
    other = read_settings(migrated(record.get("settings", {})), trust=names, workdir=origin)
    if _adds_adapters(settings, record):
        settings = settings._replace(model=model._replace(lora=Lora()))
    shapes, other_shapes = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                jax.eval_shape(build_towers(run_settings).init, jax.random.key(0))
            )
        }
        for run_settings in (settings, other)
    )
    different = [
        f"{name} is {shapes.get(name, 'absent')} here and {other_shapes.get(name, 'absent')} there"
        for name in sorted(shapes.keys() | other_shapes.keys())
        if shapes.get(name) != other_shapes.get(name)
    ]
    if different:
        raise ValueError(
            f"init_from={settings.init_from!r} has encoders of different shapes: "
            f"{'; '.join(different[:4])}. Give this run the same model and data.vocabulary_size; a "
            "run with adapters can also start from a run without them"
        )
    lora, other_lora = settings.model.lora, other.model.lora
    if lora.rank is not None and lora.alpha != other_lora.alpha:
        raise ValueError(
            f"model.lora.alpha={lora.alpha:g}, but the adapters of "
            f"init_from={settings.init_from!r} have {other_lora.alpha:g}; set it to "
            f"{other_lora.alpha:g}"
        )
