"""Loads a model to embed texts with, from a run's workdir or from a folder."""

import functools
import os
from collections.abc import Sequence

import numpy as np

from jaxcl.data.token_table import padded
from jaxcl.data.tokenizer import encode_texts, load_tokenizer
from jaxcl.host.paths import as_path
from jaxcl.run.embedding_model import EmbeddingModel, TextSide
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.workdir import CHECKPOINTS, ID_FILE
from jaxcl.settings.parts import Trust
from jaxcl.typing import SIDES, Int, PyTree

__all__ = ["load", "model_of_run"]


def load(path: str | os.PathLike[str], *, trust: Trust = ()) -> EmbeddingModel:
    """Load a model to embed texts with, on all devices.

    Args:
      path: the workdir of a run that has saved a checkpoint; it may still be training.
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
        raise FileNotFoundError(f"there is no folder {folder}; give the workdir of a run")
    if any((folder / name).exists() for name in (CHECKPOINTS, ID_FILE)):
        return model_of_run(open_run(folder, trust=trust))
    raise ValueError(f"{folder} holds no model: there is no {CHECKPOINTS}/ of a run in it")


def model_of_run(run: OpenedRun) -> EmbeddingModel:
    """The model of a run of texts.

    Raises:
      ValueError: if a side holds anything else than texts.
    """
    run.check_texts("jaxcl.load")
    settings, encoder = run.settings, run.encoder
    tokenizer = load_tokenizer(run.workdir / "tokenizer.json")

    def side_of(side: str) -> TextSide:
        longest = getattr(settings.data.max_tokens, side)
        tokenize = functools.partial(
            encode_texts,
            tokenizer,
            max_tokens=longest,
            add_cls=settings.data.add_cls,
            distinct=settings.data.distinct_tokens,
        )
        return TextSide("", longest, lambda texts, prompt: list(tokenize(texts)), as_inputs)

    return EmbeddingModel(
        source=str(run.workdir),
        encode=encoder.towers.encode,
        params=encoder.params,
        mesh=encoder.mesh,
        sides={side: side_of(side) for side in SIDES},
        dim=settings.model.dim,
    )


def as_inputs(rows: Sequence[Int[np.ndarray, " _"]], prompt: str, width: int) -> PyTree:
    """Rows of token ids, padded to a width."""
    lengths = np.array([len(row) for row in rows])
    flat = np.concatenate(rows)
    return {"tokens": padded(flat, np.cumsum(lengths) - lengths, lengths, width=width)}
