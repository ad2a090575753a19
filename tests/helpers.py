"""Helpers of many tests: unit vectors, relative errors that reject zeros and NaN, bits."""

from collections.abc import Collection, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.data.prepare import read_remembered_data
from jaxcl.losses import Masks
from jaxcl.models import Towers
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.identity import run_record
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.training import build_training
from jaxcl.run.workdir import read_config
from jaxcl.settings.read import read_settings


def some_slow(values: Iterable, quick: Collection) -> list:
    """Values as parameters of a test; all but the quick ones run only with `-m slow`."""
    return [pytest.param(one, marks=() if one in quick else pytest.mark.slow) for one in values]


def unit_vectors(seed: int, *shape: int, dtype=jnp.float64):
    """Random rows of norm 1: the scale on which losses work."""
    vectors = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype)


def relative_error(found, wanted) -> float:
    """‖found − wanted‖ / ‖wanted‖ of one array; an all-zero answer would give 1."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    scale = np.linalg.norm(wanted)
    assert scale > 0, "nothing to compare with: the reference is zero"
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()  # among several errors, `max` could ignore a NaN
    return float(np.linalg.norm(found - wanted) / scale)


def relative_errors(found, wanted) -> dict[str, float]:
    """`relative_error` for every leaf of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(path): relative_error(ours, theirs)
        for (path, ours), theirs in zip(leaves, jax.tree.leaves(wanted), strict=True)
    }


def bits(leaf) -> bytes:
    """The bytes of an array or of a random key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def unclocked(workdir: Path) -> list[dict]:
    """The metrics of a run, without times."""
    return [
        {
            name: value
            for name, value in record.items()
            if not name.startswith(("time/", "machine/"))
        }
        for record in read_metrics(workdir)
    ]


def training_of(config, **options):
    """The functions of a run, from its config."""
    return build_training(read_settings(config), **options)


def record_of(workdir: Path):
    """The record for a checkpoint of the run in a folder."""
    return run_record(read_settings(read_config(workdir)), read_remembered_data(workdir))


def final_state(workdir: Path, *, step: int):
    """The state of the newest checkpoint, which must be that of a step, on all devices."""
    program = build_training(read_settings(read_config(workdir), workdir=workdir))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(program.abstract_state())
    assert restored.step == step
    return restored.state


def loss_arguments(**options):
    """The arguments of a loss, with the fields of `Masks` collected in `masks`."""
    masks = {name: options.pop(name) for name in Masks._fields if name in options}
    return options | ({"masks": Masks(**masks)} if masks else {})


def towers_of(encode):
    """Towers with only an encode function."""
    return Towers(init=lambda key: {}, load=lambda source: {}, encode=encode)
