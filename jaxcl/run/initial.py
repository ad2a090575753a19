"""Starts a run with the encoders of another one: `config.init_from`."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.data.modalities import MODALITIES
from jaxcl.host.files import read_regular, write_whole
from jaxcl.host.paths import AnyPath
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
from jaxcl.step.train_state import TrainState

__all__ = ["copy_prepared_files", "keep_pretrained_files", "with_initial_towers"]

_MAX_BYTES = 2**30
"""Of a file that inputs depend on."""


def copy_prepared_files(settings: Settings, workdir: AnyPath) -> None:
    """Copies the files that inputs depend on, such as the tokenizer, from the other run.

    A resumed run has its own copies and no longer needs the other run.

    Raises:
      ValueError: if there is no such run, it has no such files, or a new run's `workdir` holds
        other ones.
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
    """Copy the pretrained models' small files into the workdir, with their tokenizer as the run's.

    A resumed run reads these copies, and no longer needs the original folders.

    Raises:
      ValueError: if a new run's `workdir` already has a different tokenizer, or a folder of the
        user in the place of a copy.
    """
    models = settings.parts.pretrained
    if not models or newest_record(workdir / CHECKPOINTS) is not None:
        return
    if jax.process_index() == 0:
        for section, model in models.items():
            copy = workdir / COPIES[section]
            if copy.exists() and not is_copy(copy):
                raise ValueError(
                    f"{copy} is in the way of the run's copy of its pretrained model; move it, or "
                    "choose another --workdir"
                )
            keep_copy(model, copy)
    if settings.init_from is None:
        (file,) = MODALITIES["text"].files
        content = tokenizer_of(next(iter(models.values())))
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
    """The state of a new run, with the encoders of the run that `settings.init_from` names.

    The temperature, the optimizer and all memory begin as without it; a momentum encoder begins
    as a copy of the encoders.

    Args:
      settings: the run's.
      state: its state before the first update.
      frozen: the paths of the parameters that are not trained.

    Raises:
      ValueError: if there is no such run, or its encoders have other parameters.
      CheckpointError: if its checkpoint cannot be read.
    """
    if settings.init_from is None:
        return state
    origin, named = origin_of(settings.init_from)
    if newest_record(origin / CHECKPOINTS) is None:
        raise ValueError(
            f"init_from={settings.init_from!r}: no run has saved a checkpoint in {origin}; give "
            "the workdir of one that has"
        )
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        state.params["towers"],
    )
    with Checkpoints(origin / CHECKPOINTS, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(
            {"params": {"towers": abstract}},
            partial=True,
            only=named if isinstance(named, int) else None,
            best=named == BEST,
            check=functools.partial(_check_same_parameters, settings, origin),
        )
    assert restored is not None  # there is a record
    towers = restored.state["params"]["towers"]
    memory = dict(state.memory)
    if "momentum" in memory:
        # A copy, since the state is donated as a whole.
        trained, _ = split({"towers": towers}, frozen)
        memory["momentum"] = jax.tree.map(jnp.copy, trained.get("towers", {}))
    return state._replace(params=state.params | {"towers": towers}, memory=memory)


def _check_same_parameters(settings: Settings, origin: AnyPath, record: Mapping[str, Any]) -> None:
    model = settings.model
    # The other run's file may name code: only packages that this run names are imported.
    names = {str(name).partition(":")[0].partition(".")[0] for name in (model.name, model.key.name)}
    other = read_settings(migrated(record.get("settings", {})), trust=names, workdir=origin)
    ours, theirs = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                jax.eval_shape(build_towers(one).init, jax.random.key(0))
            )
        }
        for one in (settings, other)
    )
    different = [
        f"{name} is {ours.get(name, 'absent')} here and {theirs.get(name, 'absent')} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        raise ValueError(
            f"init_from={settings.init_from!r} has encoders of other shapes: "
            f"{'; '.join(different[:4])}. Give this run the same model and data.vocabulary_size"
        )
