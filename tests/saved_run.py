"""Create workdirs of finished runs without training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.data.prepare import RememberedData
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.models.lora import with_base
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.identity import run_record
from jaxcl.run.initial import keep_pretrained_files
from jaxcl.run.training import build_towers, pretrained_sources
from jaxcl.run.workdir import claim_workdir
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import Settings

TEXTS = [
    "parse an ISO date",
    "open a window and close it again, then open another window",
    "[PAD] is padding and [CLS] begins a text",
    "naïve 日本 text",
]
EXPORTED = {"position_weights": False, "max_tokens": 12}


BASE = {
    "steps": 7,
    "global_batch_size": 8,
    "data": {"name": "pairs", "vocabulary_size": 120, "max_tokens": {"query": 12, "key": 12}},
    "model": {"dim": 6, "options": EXPORTED},
    "evaluation": {"batch_size": 8},
}
TUNED = BASE | {"data": {"name": "pairs", "max_tokens": {"query": 12, "key": 12}}, "model": {}}


def settings_of(base=BASE, **changes):
    """The settings of a small run; `data__add_cls=True` changes `data.add_cls`."""
    config = dict(base)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section] = config.get(section, {}) | {field: value} if field else value
    return read_settings(config)


def save_run(workdir: Path, **changes) -> Path:
    """Write the workdir of a run, with one checkpoint of random parameters."""
    settings = settings_of(**changes)
    claim_workdir(workdir, settings)
    tokenizer = train_tokenizer(TEXTS[:3], vocabulary_size=120)
    (workdir / "tokenizer.json").write_text(tokenizer.to_str())
    rng = np.random.default_rng(0)
    towers = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        jax.eval_shape(build_towers(settings).init, jax.random.key(0)),
    )
    return _with_checkpoint(workdir, settings, towers)


def save_tuned_run(workdir: Path, pretrained: Path, **changes) -> Path:
    """Write the workdir of a run that still has the parameters of its pretrained model.

    With `model__lora`, it has random adapters.
    """
    settings = settings_of(TUNED, model__pretrained=str(pretrained), **changes)
    claim_workdir(workdir, settings)
    keep_pretrained_files(settings, workdir)
    towers, rng = build_towers(settings), np.random.default_rng(0)
    initial = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype),
        jax.eval_shape(towers.init, jax.random.key(0)),
    )
    loaded = with_base(initial, towers.load(pretrained_sources(settings)))
    placed = jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype), loaded, initial)
    return _with_checkpoint(workdir, settings, placed)


def _with_checkpoint(workdir: Path, settings: Settings, towers) -> Path:
    record = run_record(settings, RememberedData("pairs", {}))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": {"towers": towers}}, record)
    return workdir
