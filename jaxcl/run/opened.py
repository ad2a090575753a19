"""Open the encoder and the data of a trained run, for search, mining, topics and export."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.data.modalities import build_readers, check_inputs, modality_of, open_tables, usable_rows
from jaxcl.data.prepare import RememberedData, read_remembered_data, remembered_from
from jaxcl.data.row_prompts import RowPrompts, row_prompts
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import open_splits
from jaxcl.data.table import Table
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar
from jaxcl.host.user_folders import shared_folder
from jaxcl.models import Towers
from jaxcl.models.lora import Lora, merge_adapters
from jaxcl.models.trainable import merge, split
from jaxcl.ops.mesh import current_mesh, make_mesh, replicated_sharding
from jaxcl.run.checkpoint import Checkpoints, Restored, checksum
from jaxcl.run.checkpoint_record import check_none_lost
from jaxcl.run.encoder import Encoder
from jaxcl.run.optimizer import frozen_parameters
from jaxcl.run.training import (
    abstract_parameters,
    build_embedder,
    build_towers,
    evaluation_towers,
)
from jaxcl.run.workdir import CHECKPOINTS, check_saved_settings, read_config
from jaxcl.settings.check_evaluation import check_weights
from jaxcl.settings.derived import BEST, origin_of
from jaxcl.settings.file_kinds import names_files, relocated_splits
from jaxcl.settings.parts import Trust, is_function_name
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, Float, PyTree

__all__ = ["OpenedRun", "open_run"]


class OpenedRun(NamedTuple):
    """The state of a run at one of its checkpoints, on the available devices.

    Attributes:
      workdir: the folder of the run.
      settings: the settings of the run.
      encoder: the model of the run.
      data_set: the name or folder of the run's data set.
      made_from: a description of model and data; equal descriptions mean equal embeddings.
      checkpoint: the requested step or `"best"`; `None` for the newest checkpoint.
      weights: `"trained"` or `"average"`.
    """

    workdir: AnyPath
    settings: Settings
    encoder: Encoder
    data_set: str
    made_from: dict[str, Any]
    checkpoint: int | str | None = None
    weights: str = "trained"

    @property
    def path(self) -> AnyPath:
        """The path with which `open_run` opens this checkpoint again."""
        if self.checkpoint is None:
            return self.workdir
        return self.workdir / CHECKPOINTS / str(self.checkpoint)

    def merged(self) -> "OpenedRun":
        """The run with its adapters merged into the kernels, on the host; unchanged without any."""
        model = self.settings.model
        if model.lora.rank is None:
            return self
        encoder = self.encoder._replace(params=merge_adapters(self.encoder.params, model.lora))
        settings = self.settings._replace(model=model._replace(lora=Lora()))
        return self._replace(settings=settings, encoder=encoder)

    def sources(self) -> dict[str, PairSource]:
        """Open the splits that the run started with, in the same place; never prepare them again.

        Raises:
          ValueError: if the splits are missing, or have different rows.
        """
        folder = Path(self.data_set)
        if folder.is_absolute() and not (folder.exists() or names_files(self.data_set)):
            raise ValueError(
                f"the rows of the run in {self.workdir} are missing from {self.data_set}; the "
                "command that trained it prepares them again, if the same packages are installed"
            )
        data = self.settings.data
        splits = relocated_splits(data.splits, name=data.name, absolute_name=self.data_set)
        data_dir = shared_folder(self.settings.run.data_dir)
        sources = open_splits(
            data._replace(splits=splits),
            self.data_set,
            data_dir=data_dir,
            open_source=self._open_source(),
            usable=functools.partial(usable_rows, data, data_dir=data_dir),
        )
        fingerprints = self.made_from["fingerprints"]
        if any(source.fingerprint != fingerprints.get(role) for role, source in sources.items()):
            raise ValueError(
                f"{self.data_set}, or a data set of data.concatenated, no longer has the rows "
                f"that the run in {self.workdir} was trained on; restore them, or train again in "
                "another --workdir"
            )
        return sources

    def prompts(self, sources: Mapping[str, PairSource]) -> dict[str, RowPrompts]:
        """The prompts of the rows of each split whose data sets have different prompts."""
        prompts = {
            split: row_prompts(self.settings.data, split, source)
            for split, source in sources.items()
        }
        return {split: one for split, one in prompts.items() if one is not None}

    def check_texts(self, command: str) -> None:
        """Raise a `ValueError` if a side of the run has inputs other than texts."""
        modality = self.settings.data.modality
        if set(modality) != {"text"}:
            raise ValueError(
                f"{command} reads and prints texts, but the run in {self.workdir} has "
                f"data.modality={modality._asdict()}"
            )

    def _open_source(self) -> Callable[[str], PairSource] | None:
        name, function = self.settings.data.name, self.settings.parts.source
        if is_function_name(name) and function is None:
            raise PermissionError(
                f"data.name={name!r} would run code of that package; if you trust it, add it with "
                "--trust"
            )
        return function

    def table(self, split: str, source: PairSource) -> Table:
        """Open the pairs of a split as inputs of the encoders."""
        data_dir = shared_folder(self.settings.run.data_dir)
        tables = open_tables(
            self.settings.data, {split: source}, data_dir=data_dir, workdir=self.workdir
        )
        return tables[split]

    def embeddings(self, split: str, source: PairSource) -> dict[str, Float[np.ndarray, "n d"]]:
        """Embed both sides of all rows of a split."""
        table = self.table(split, source)
        with progress_bar(f"embedding {split}", len(SIDES) * table.num_rows) as advance:
            return {side: self.encoder.embed(side, table, advance=advance) for side in SIDES}


def open_run(path: AnyPath, *, trust: Trust = (), weights: str | None = None) -> OpenedRun:
    """Open a run without changing it; it may still be training.

    The training data and their paths are not needed, so a copied workdir can be opened as well. If
    the best checkpoint is damaged, the newest one is opened instead, with a warning.

    Args:
      path: the workdir of a run, for its newest checkpoint, or `WORKDIR/checkpoints/STEP` or
        `WORKDIR/checkpoints/best`.
      trust: packages from which an encoder named `package.module:function` may be imported.
      weights: `"trained"`, or `"average"` for the moving average of the weights; `None` for the
        weights of the run's `evaluation.weights`.

    Raises:
      ValueError: if there is no run or no checkpoint, or the requested best checkpoint or averaged
        weights do not exist.
      CheckpointError: if no checkpoint can be read.
      PermissionError: for an encoder from a package that is not trusted.
    """
    workdir, checkpoint = origin_of(path)
    settings = read_settings(read_config(workdir), trust=trust, workdir=workdir)
    weights = settings.evaluation.weights if weights is None else weights
    check_weights(settings, "weights", weights)
    mesh = make_mesh({"data": -1})  # all available devices, whatever the mesh of the run
    towers = build_towers(settings)
    with current_mesh(mesh):
        restored, params = _restore_towers(towers, settings, workdir, checkpoint, mesh, weights)
        checksums = [int(checksum(leaf)) for leaf in jax.tree.leaves(params)]
    saved = remembered_from(workdir / CHECKPOINTS, restored.record.get("data"))
    check_inputs(settings.data, workdir, saved.fingerprints)
    towers = evaluation_towers(settings, towers)
    embedder = build_embedder(settings, towers, mesh)
    made_from = {
        "step": restored.step,
        # The step is not enough, since a run that starts over reaches the same steps.
        "parameters": checksums,
        "inputs": {side: modality_of(settings.data, side).fingerprint(workdir) for side in SIDES},
        "fingerprints": {
            role: value
            for role, value in saved.fingerprints.items()
            if role in settings.data.splits
        },
    }
    encoder = Encoder(mesh, towers, embedder, params, build_readers(settings.data, workdir))
    data_set = _data_set(workdir, saved)
    return OpenedRun(workdir, settings, encoder, data_set, made_from, checkpoint, weights)


def _restore_towers(
    towers: Towers,
    settings: Settings,
    workdir: AnyPath,
    checkpoint: int | str | None,
    mesh: jax.sharding.Mesh,
    weights: str,
) -> tuple[Restored, PyTree]:
    """Restore only the parameters of the towers, without reading the rest of the state."""
    abstract: PyTree = {"params": {"towers": towers.abstract_parameters(replicated_sharding(mesh))}}
    if weights == "average":
        frozen = frozen_parameters(settings, abstract_parameters(settings, towers))
        trained, held = split(abstract["params"], frozen)
        abstract = {"memory": {"average": {"towers": trained.get("towers", {})}}}
        abstract |= {"params": held} if held else {}
    directory = workdir / CHECKPOINTS
    restored = None
    if directory.is_dir():
        with Checkpoints(directory, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(
                abstract,
                partial=True,
                only=checkpoint if isinstance(checkpoint, int) else None,
                best=checkpoint == BEST,
                check=functools.partial(check_saved_settings, workdir, settings),
            )
    if restored is None:
        check_none_lost(directory)
        raise ValueError(
            f"the run in {workdir} has not saved a checkpoint yet; train it first with "
            "python -m jaxcl.train --config … --workdir …"
        )
    params = restored.state.get("params", {}).get("towers", {})
    if weights == "average":
        params = merge(restored.state["memory"]["average"]["towers"], params)
    return restored, params


def _data_set(workdir: AnyPath, saved: RememberedData) -> str:
    """The data set of a run, from `data.json`, which a user may edit if the data have moved."""
    with contextlib.suppress(ValueError):
        if (remembered := read_remembered_data(workdir)) is not None:
            return remembered.data_set
    return saved.data_set
