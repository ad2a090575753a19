"""Opens a run that has been trained, for whoever reads it: search, mining."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from jaxcl.data.prepare import read_remembered_data
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import open_splits
from jaxcl.data.token_table import TokenTable, build_token_table
from jaxcl.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from jaxcl.host.progress import progress_bar
from jaxcl.run.checkpoint import Checkpoints, checksum
from jaxcl.run.workdir import read_config
from jaxcl.settings.build import Program, build_program
from jaxcl.typing import SIDES, Float, PyTree

__all__ = ["Trained", "open_trained"]


class Trained(NamedTuple):
    """A run as its newest checkpoint left it, on the present devices.

    Attributes:
      config: the run's, but for its mesh and batch size, which are those of the present devices.
      sources: split -> its pairs as text.
      tokenizer: the run's own.
      program: its functions.
      params: of the towers.
      made_from: what names all of these: an equal one gives equal embeddings.
    """

    config: ConfigDict
    sources: Mapping[str, PairSource]
    tokenizer: Tokenizer
    program: Program
    params: PyTree
    made_from: dict[str, Any]

    def token_table(self, split: str) -> TokenTable:
        """A split's pairs as token ids."""
        source, config = self.sources[split], self.config
        with progress_bar(f"tokenising {split}", len(source)) as advance:
            return build_token_table(
                source,
                self.tokenizer,
                max_tokens=dict(config.data.max_tokens),
                add_cls=config.data.add_cls,
                distinct=config.data.distinct_tokens,
                directory=Path(config.run.data_dir).expanduser() / "tokens",
                advance=advance,
            )

    def embeddings(self, split: str) -> dict[str, Float[np.ndarray, "n d"]]:
        """All rows of a split, embedded: side -> vectors."""
        table = self.token_table(split)
        rows = np.arange(table.num_rows)
        with progress_bar(f"embedding {split}", len(SIDES) * table.num_rows) as advance:
            return {
                side: self.program.embed(
                    self.params, side, table.side(side, rows)["tokens"], advance=advance
                )
                for side in SIDES
            }


def open_trained(workdir: Path) -> Trained:
    """Opens a run; nothing of it is changed, and it may still be training.

    Raises:
      ValueError: if there is no run, it has no checkpoint, or its data are gone.
      CheckpointError: if no checkpoint can be read.
    """
    workdir = Path(workdir)
    config = _config(workdir)
    sources = _open_sources(config, workdir)
    tokenizer = load_tokenizer(workdir / "tokenizer.json")
    program = build_program(config)
    params, step = _newest_params(program, workdir)
    made_from = {
        "step": step,
        # A run that was trained again from nothing passes the same steps.
        "parameters": [int(checksum(leaf)) for leaf in jax.tree.leaves(params)],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "fingerprints": {role: source.fingerprint for role, source in sources.items()},
    }
    return Trained(config, sources, tokenizer, program, params, made_from)


def _config(workdir: Path) -> ConfigDict:
    config = read_config(workdir)
    with config.unlocked():
        # Nothing is trained here, so that the devices need not be those of the run, nor divide its
        # batch.
        config.run.mesh = ConfigDict({"data": -1})
        config.global_batch_size = 2 * jax.device_count()
        if "assignment" in config:
            config.assignment.gcbs.block_size = None  # whole batches, whatever their size
        if "negatives" in config:
            config.negatives.proportions = "rows"  # of groups that are not read here
    return config


def _open_sources(config: ConfigDict, workdir: Path) -> dict[str, PairSource]:
    """Open the splits that the run began with, where they were; nothing is prepared again."""
    remembered = read_remembered_data(workdir)
    if remembered is None:
        raise ValueError(_train_first(f"the run in {workdir} has not opened its data yet"))
    data_set, fingerprints = remembered
    if Path(data_set).is_absolute() and not Path(data_set).exists():
        raise ValueError(
            f"the rows of the run in {workdir} are gone from {data_set}; the "
            "command that trained it makes them again, if the same packages are installed"
        )
    sources = open_splits(config.data, data_set, data_dir=Path(config.run.data_dir).expanduser())
    if any(source.fingerprint != fingerprints.get(role) for role, source in sources.items()):
        raise ValueError(
            f"{data_set}, or a data set of data.concatenated, no longer holds the "
            f"rows that the run in {workdir} was trained on; put them back, or train again in "
            "another --workdir"
        )
    return sources


def _newest_params(program: Program, workdir: Path) -> tuple[PyTree, int]:
    directory = workdir / "checkpoints"
    if directory.is_dir():
        state = program.abstract_state(1, np.zeros(1, np.int32))  # the memory is not read
        unread = jax.tree.map(lambda _: ..., (state.optimizer, state.memory))
        with Checkpoints(directory, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(
                state._replace(optimizer=unread[0], memory=unread[1])
            )
        if restored is not None:
            return restored.state.params["towers"], restored.step
    raise ValueError(_train_first(f"the run in {workdir} has saved no checkpoint yet"))


def _train_first(why: str) -> str:
    return f"{why}; train first: python -m jaxcl.train --config … --workdir …"
