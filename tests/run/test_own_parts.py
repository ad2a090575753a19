"""A run with data, batches, a loss and an augmentation from a user's package."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.opened import open_run
from jaxcl.run.training import build_training
from jaxcl.settings.read import read_settings
from jaxcl.train import train

OWN_PARTS = """
import jax.numpy as jnp

from jaxcl.data.sources import InMemoryPairs
from jaxcl.losses import Loss, infonce_loss

STEPS = []


def open_split(role):
    words = ["red", "green", "blue", "black", "white", "pink", "brown", "grey"]
    texts = [f"{role} {first} {second}" for first in words for second in words]
    return InMemoryPairs(texts, [f"the colour {text}" for text in texts])


def in_order(*, num_rows, batch_size, seed):
    def rows(step):
        STEPS.append(step)
        return (step * batch_size + jnp.arange(batch_size)) % num_rows

    return rows


def doubled_loss(queries, keys, *, weight=2.0, **arguments):
    return weight * infonce_loss(queries, keys, **arguments)


def cosine_loss(queries, keys, *, temperature):
    return (1 - (queries * keys).sum(1)) / temperature


ALONE = Loss(cosine_loss, masks=(), negatives=(), exchanges=False)
BY_GROUP = Loss(infonce_loss, masks=("groups", "valid"), negatives=())


def forget_first(*, count):
    def augment(inputs, key):
        tokens = inputs["tokens"]
        return {"tokens": jnp.where(jnp.arange(tokens.shape[0]) < count, 0, tokens)}

    return augment
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The module `own_parts`, which the config names."""
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    import own_parts

    own_parts.STEPS.clear()
    return own_parts


def config(folder, **changes):
    settings = {
        "steps": 4,
        "global_batch_size": 16,
        "data": {
            "name": "own_parts:open_split",
            "splits": {"train": "train", "validation": "validation"},
            "vocabulary_size": 300,
            "max_tokens": {"query": 6, "key": 8},
        },
        "model": {"dim": 8, "options": {"max_tokens": 8}},
        "evaluation": {"methods": ("dense",)},
        "run": {"data_dir": str(folder / "data"), "log_every": 1, "checkpoint_every": 4},
        **changes,
    }
    return ConfigDict(settings)


def losses(workdir):
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


def test_data_and_batches_of_a_package_are_trained_on(parts, tmp_path):
    own = config(tmp_path, assignment={"name": "own_parts:in_order"})
    train(own, tmp_path / "run")
    assert set(parts.STEPS) >= set(range(4))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rows"] == {"train": 64, "validation": 64}
    run = open_run(tmp_path / "run", trust=("own_parts",))
    assert len(run.sources()["train"]) == 64
    assert run.encoder.encode("query", ["train red red"]).shape == (1, 8)
    assert run.encoder.encode("query", []).shape == (0, 8)
    with pytest.raises(PermissionError, match="add it with --trust"):
        open_run(tmp_path / "run").sources()


def test_a_loss_and_an_augmentation_of_a_package_are_trained_with(parts, tmp_path):
    train(config(tmp_path), tmp_path / "plain")
    train(config(tmp_path, loss={"name": "own_parts:doubled_loss"}), tmp_path / "doubled")
    weighted = {"name": "own_parts:doubled_loss", "options": {"weight": 1.0}}
    train(config(tmp_path, loss=weighted), tmp_path / "weighted")
    forgetful = {"name": "own_parts:forget_first", "options": {"count": 3}}
    train(config(tmp_path, augmentation=forgetful), tmp_path / "forgetful")
    plain = losses(tmp_path / "plain")
    np.testing.assert_allclose(losses(tmp_path / "doubled")[0], 2 * plain[0], rtol=1e-6)
    np.testing.assert_allclose(losses(tmp_path / "weighted"), plain, rtol=1e-6)
    assert abs(losses(tmp_path / "forgetful")[0] / plain[0] - 1) > 1e-3


def test_a_loss_without_masks_and_negatives_works_under_the_default_config(parts, tmp_path):
    alone = {"name": "own_parts:ALONE"}
    train(config(tmp_path, loss=alone), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 4
    for changes, message in (
        ({"margin": 0.1}, r"loss\.margin=0\.1, but 'own_parts:ALONE' takes none"),
        ({"masks": ("group",)}, "does not mask by groups"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings({"loss": alone | changes, "data": {"group_field": "group"}})
    with pytest.raises(ValueError, match=r"loss\.masks has no effect here"):
        read_settings({"loss": alone}, changed=["loss.masks"])
    by_group = {"name": "own_parts:BY_GROUP", "masks": ("group",)}
    read_settings({"loss": by_group, "data": {"group_field": "group"}}, changed=["loss.masks"])


def test_a_nested_running_estimate_remembers_each_length(tmp_path, parts):
    nested = {"name": "running_estimate", "matryoshka_dims": (4, 8)}
    whole = config(tmp_path, loss=nested)
    train(whole, tmp_path / "whole")
    memory = open_memory(tmp_path / "whole", whole)
    assert set(memory["rows"]) == {"4", "8"}
    seen = {dim: np.isfinite(tables["estimates"]).sum() for dim, tables in memory["rows"].items()}
    assert seen["4"] == seen["8"] == 2 * 64  # 4 steps of 16 rows cover all rows, in two directions
    assert not np.array_equal(*(tables["estimates"] for tables in memory["rows"].values()))


def open_memory(workdir, settings):
    """The memory in the newest checkpoint."""
    training = build_training(read_settings(settings))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(training.abstract_state(64))
    return jax.device_get(restored.state.memory)
