"""Everything that the golden results know about the package; the rest of this folder imports it.

When a module moves or a file of a run changes, this file is edited; when a setting or an argument
is renamed, the tables in `runs.py` and `losses.py` are. The results themselves depend on neither.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.losses import (
    ExplicitNegatives,
    Masks,
    OwnNegatives,
    SharedNegatives,
    decoupled_infonce_loss,
    distillation_loss,
    hard_infonce_loss,
    infonce_loss,
    matryoshka,
    measure_negatives,
    running_estimate_loss,
    sigmoid_pair_loss,
    supervised_infonce_loss,
)
from tests.goldens.pairs import Pair, read_pairs

__all__ = [
    "LOSSES",
    "ROOT",
    "ExplicitNegatives",
    "Masks",
    "OwnNegatives",
    "SharedNegatives",
    "digests",
    "matryoshka",
    "measure_negatives",
    "prepare_data_set",
    "read_run",
    "train_command",
]

ROOT = Path(__file__).parents[2]

LOSSES = {
    "decoupled_infonce": decoupled_infonce_loss,
    "distillation": distillation_loss,
    "hard_infonce": hard_infonce_loss,
    "infonce": infonce_loss,
    "running_estimate": running_estimate_loss,
    "sigmoid_pair": sigmoid_pair_loss,
    "supervised_infonce": supervised_infonce_loss,
}
"""The public losses by name."""

_DATA_SET = "golden_pairs"
_CLOCK = ("time/", "machine/")  # metrics that differ between equal runs


def train_command(
    config: str, settings: Iterable[str], *, data_dir: Path, workdir: Path
) -> list[str]:
    """The command line of a run on the data set of `prepare_data_set`.

    Args:
      config: a config file, relative to the root of the repository, with a variant after a colon.
      settings: `NAME=VALUE`, of the config.
      data_dir: the folder with the data set in `sets/`, and with token tables.
      workdir: the run's own directory.
    """
    own = (
        f"data.name={data_dir / 'sets' / _DATA_SET / '1.0.0'}",
        "data.group_field=group",
        "data.metadata_fields=()",
        f"run.data_dir={data_dir}",
    )
    return [
        *(sys.executable, "-m", "jaxcl.train", f"--config={ROOT / config}"),
        f"--workdir={workdir}",
        *(f"--config.{setting}" for setting in (*own, *settings)),
    ]


def prepare_data_set(directory: Path) -> None:
    """Write `pairs.tsv` as a TFDS data set."""
    import tensorflow_datasets as tfds

    class GoldenPairs(tfds.core.GeneratorBasedBuilder):
        """The pairs of the golden runs."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = [column for column in Pair._fields if column != "split"]
            features = tfds.features.FeaturesDict(dict.fromkeys(columns, tfds.features.Text()))
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            splits = dict.fromkeys(pair.split for pair in read_pairs())
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for row, pair in enumerate(read_pairs()):
                if pair.split == split:
                    columns = pair._asdict()
                    del columns["split"]
                    yield row, columns

    tfds.disable_progress_bar()
    GoldenPairs(data_dir=directory, file_format="array_record").download_and_prepare()


def read_run(workdir: Path) -> dict[str, Any]:
    """The metrics of a finished run, its evaluation, and digests of its last checkpoint.

    Returns:
      `"metrics"`, a value by `STEP/NAME` or by path in the evaluation; and `"state"`, one entry for
      each array of the checkpoint, in an order that does not depend on its name.
    """
    metrics: dict[str, Any] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        metrics |= {
            f"{step}/{name}": value for name, value in values.items() if not name.startswith(_CLOCK)
        }
    evaluation = json.loads((workdir / "results.json").read_text())["metrics"]
    with np.load(workdir / "ranks.npz") as file:
        ranks = {name: file[name].tolist() for name in file.files}
    for prefix, tree in (("evaluation", evaluation), ("ranks", ranks)):
        metrics |= {
            f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda node: isinstance(node, list)
            )
        }
    return {"metrics": metrics, "state": digests(_checkpoint(workdir))}


def digests(state: Any) -> list[dict[str, Any]]:
    """The shape, type and hash of each array of a state, in an order that ignores names."""
    return sorted(map(_digest, jax.tree.leaves(state)), key=json.dumps)


def _checkpoint(workdir: Path) -> Any:
    """The state in the newest checkpoint, of any structure, as arrays on one device."""
    from orbax.checkpoint import v1 as ocp

    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device),
        ocp.checkpointables_metadata(newest).metadata["state"],
    )
    return ocp.load_checkpointables(newest, {"state": shapes})["state"]


def _digest(leaf: Any) -> dict[str, Any]:
    """The shape, type and hash of an array, and its norm and sum, to measure differences."""
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    finite = array.astype(np.float64)
    finite = finite[np.isfinite(finite)]
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "norm": float(np.linalg.norm(finite)),
        "sum": float(finite.sum()),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
