"""Opens a run that has been trained, for search, mining and topics: its encoder, and its data."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.data.modalities import build_readers, check_inputs, modality_of, open_tables
from jaxcl.data.prepare import RememberedData, read_remembered_data, remembered_from
from jaxcl.data.row_prompts import RowPrompts, row_prompts
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import open_splits
from jaxcl.data.table import Table
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar
from jaxcl.host.user_folders import shared_folder
from jaxcl.models import Towers
from jaxcl.ops.mesh import current_mesh, make_mesh, replicated_sharding
from jaxcl.run.checkpoint import Checkpoints, Restored, checksum
from jaxcl.run.checkpoint_record import check_none_lost
from jaxcl.run.encoder import Encoder
from jaxcl.run.training import build_towers
from jaxcl.run.workdir import CHECKPOINTS, check_saved_settings, read_config
from jaxcl.settings.derived import BEST, origin_of
from jaxcl.settings.file_kinds import names_files, relocated_splits
from jaxcl.settings.parts import Trust, is_function_name
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings
from jaxcl.step.embedder import make_embedder
from jaxcl.typing import SIDES, Float

__all__ = ["OpenedRun", "open_run"]


class OpenedRun(NamedTuple):
    """A run as one of its checkpoints left it, on the present devices.

    Attributes:
      workdir: the run's folder.
      settings: the run's.
      encoder: its model.
      data_set: the name or folder of its data set.
      made_from: names all of this: an equal one gives equal embeddings.
      checkpoint: the step, or `"best"`, that was asked for; None for the newest.
    """

    workdir: AnyPath
    settings: Settings
    encoder: Encoder
    data_set: str
    made_from: dict[str, Any]
    checkpoint: int | str | None = None

    @property
    def path(self) -> AnyPath:
        """What opens this checkpoint again: the workdir, or the path of the checkpoint."""
        if self.checkpoint is None:
            return self.workdir
        return self.workdir / CHECKPOINTS / str(self.checkpoint)

    def sources(self) -> dict[str, PairSource]:
        """The splits that the run began with, as text; opened where they were, never made again.

        Raises:
          ValueError: if they are gone, or hold other rows.
        """
        folder = Path(self.data_set)
        if folder.is_absolute() and not (folder.exists() or names_files(self.data_set)):
            raise ValueError(
                f"the rows of the run in {self.workdir} are gone from {self.data_set}; the "
                "command that trained it makes them again, if the same packages are installed"
            )
        data = self.settings.data
        splits = relocated_splits(data.splits, name=data.name, absolute_name=self.data_set)
        sources = open_splits(
            data._replace(splits=splits),
            self.data_set,
            data_dir=shared_folder(self.settings.run.data_dir),
            open_source=self._open_source(),
        )
        fingerprints = self.made_from["fingerprints"]
        if any(source.fingerprint != fingerprints.get(role) for role, source in sources.items()):
            raise ValueError(
                f"{self.data_set}, or a data set of data.concatenated, no longer holds the "
                f"rows that the run in {self.workdir} was trained on; put them back, or train "
                "again in another --workdir"
            )
        return sources

    def prompts(self, sources: Mapping[str, PairSource]) -> dict[str, RowPrompts]:
        """Split -> the prompts of its rows, where its data sets have different ones."""
        prompts = {
            split: row_prompts(self.settings.data, split, source)
            for split, source in sources.items()
        }
        return {split: one for split, one in prompts.items() if one is not None}

    def check_texts(self, command: str) -> None:
        """Raise a `ValueError` if a side of the run holds anything else than texts."""
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
                f"data.name={name!r} would run code of that package; name it with --trust if you "
                "trust it"
            )
        return function

    def table(self, split: str, source: PairSource) -> Table:
        """A split's pairs as inputs of the encoders."""
        data_dir = shared_folder(self.settings.run.data_dir)
        tables = open_tables(
            self.settings.data, {split: source}, data_dir=data_dir, workdir=self.workdir
        )
        return tables[split]

    def embeddings(self, split: str, source: PairSource) -> dict[str, Float[np.ndarray, "n d"]]:
        """All rows of a split, embedded: side -> vectors."""
        table = self.table(split, source)
        with progress_bar(f"embedding {split}", len(SIDES) * table.num_rows) as advance:
            return {side: self.encoder.embed(side, table, advance=advance) for side in SIDES}


def open_run(path: AnyPath, *, trust: Trust = ()) -> OpenedRun:
    """Opens a run; nothing of it is changed, and it may still be training.

    Neither its training data nor their paths are needed: a workdir that was copied opens as well.
    If the best checkpoint is damaged, the newest is opened instead, with a warning.

    Args:
      path: the workdir of a run that has saved a checkpoint, for the newest one, or
        `WORKDIR/checkpoints/STEP` or `WORKDIR/checkpoints/best`.
      trust: the packages from which an encoder named `package.module:function` is imported.

    Raises:
      ValueError: if there is no run, or it has no checkpoint, or no best one.
      CheckpointError: if no checkpoint can be read.
      PermissionError: for an encoder of a package that is not trusted.
    """
    workdir, named = origin_of(path)
    settings = read_settings(read_config(workdir), trust=trust, workdir=workdir)
    mesh = make_mesh({"data": -1})  # the present devices, whatever the run's were
    towers = build_towers(settings)
    with current_mesh(mesh):
        restored = _named_params(towers, settings, workdir, named, mesh)
        checksums = [int(checksum(leaf)) for leaf in jax.tree.leaves(restored.state)]
    params = restored.state["params"]["towers"]
    saved = remembered_from(workdir / CHECKPOINTS, restored.record.get("data"))
    check_inputs(settings.data, workdir, saved.fingerprints)
    embedder = make_embedder(towers.encode, mesh, batch_size=settings.evaluation.batch_size)
    made_from = {
        "step": restored.step,
        # A run that was trained again from nothing passes the same steps.
        "parameters": checksums,
        "inputs": {side: modality_of(settings.data, side).fingerprint(workdir) for side in SIDES},
        "fingerprints": {
            role: value
            for role, value in saved.fingerprints.items()
            if role in settings.data.splits
        },
    }
    encoder = Encoder(mesh, towers, embedder, params, build_readers(settings.data, workdir))
    return OpenedRun(workdir, settings, encoder, _data_set(workdir, saved), made_from, named)


def _named_params(
    towers: Towers,
    settings: Settings,
    workdir: AnyPath,
    named: int | str | None,
    mesh: jax.sharding.Mesh,
) -> Restored:
    """The parameters of the towers alone: nothing else of the state is read."""
    abstract = towers.abstract_parameters(replicated_sharding(mesh))
    directory = workdir / CHECKPOINTS
    restored = None
    if directory.is_dir():
        with Checkpoints(directory, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(
                {"params": {"towers": abstract}},
                partial=True,
                only=named if isinstance(named, int) else None,
                best=named == BEST,
                check=functools.partial(check_saved_settings, workdir, settings),
            )
    if restored is None:
        check_none_lost(directory)
        raise ValueError(
            f"the run in {workdir} has saved no checkpoint yet; train first: "
            "python -m jaxcl.train --config … --workdir …"
        )
    return restored


def _data_set(workdir: AnyPath, saved: RememberedData) -> str:
    """The data set of a run; `data.json` may name the folder to which it was moved."""
    with contextlib.suppress(ValueError):
        if (remembered := read_remembered_data(workdir)) is not None:
            return remembered.data_set
    return saved.data_set
