"""Loads a model to embed texts with, from a run's workdir or from a folder."""

import os

from jaxcl.data.modalities import Text, text_rule
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.encoder import Encoder
from jaxcl.run.exported import EXPORT_FILE, open_exported
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.workdir import CHECKPOINTS, ID_FILE
from jaxcl.settings.parts import Trust
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = ["is_run", "load", "model_of_run"]


def load(path: str | os.PathLike[str], *, trust: Trust = ()) -> EmbeddingModel:
    """Load a model to embed texts with, on all devices.

    Args:
      path: the workdir of a run that has saved a checkpoint, which may still be training; or a
        folder that `jaxcl.export` has written with `--format jaxcl`.
      trust: the packages from which an encoder named `package.module:function` is imported.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it holds no model.
      CheckpointError: if no checkpoint of a run can be read.
      PermissionError: for an encoder of a package that is not trusted.

    Example:
      model = jaxcl.load("runs/code_search")
      model.encode("parse an ISO date").shape  # (512,)
    """
    folder = as_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give the workdir of a run or the folder of a model"
        )
    if is_run(folder):
        return model_of_run(open_run(folder, trust=trust))
    if (folder / EXPORT_FILE).exists():
        exported = open_exported(folder, trust=trust)
        return _trained_model(exported.folder, exported.settings, exported.encoder)
    raise ValueError(
        f"{folder} holds no model: there is no {CHECKPOINTS}/ of a run and no {EXPORT_FILE} of an "
        "exported model"
    )


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is the workdir of a run."""
    folder = as_path(path)
    return any((folder / name).exists() for name in (CHECKPOINTS, ID_FILE))


def model_of_run(run: OpenedRun) -> EmbeddingModel:
    """The model of a run.

    Raises:
      ValueError: if a side holds anything else than texts.
    """
    return _trained_model(run.workdir, run.settings, run.encoder)


def _trained_model(folder: AnyPath, settings: Settings, encoder: Encoder) -> EmbeddingModel:
    modality = settings.data.modality
    if set(modality) != {"text"}:
        raise ValueError(
            f"{folder} has a model of data.modality={modality._asdict()}; jaxcl.load takes models "
            "of texts"
        )
    return EmbeddingModel(
        source=str(folder),
        encode=encoder.towers.encode,
        params=encoder.params,
        mesh=encoder.mesh,
        tokenizer=Text().tokenizer(settings.data, folder),
        rules={side: text_rule(settings.data, side) for side in SIDES},
        dim=settings.model.dim,
    )
