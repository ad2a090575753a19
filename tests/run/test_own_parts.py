"""A run whose data, batches, loss and augmentation come from a package of the user."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.opened import open_run
from jaxcl.train import train

OWN_PARTS = """
import jax.numpy as jnp

from jaxcl.data.sources import InMemoryPairs
from jaxcl.losses import infonce_loss

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
    with pytest.raises(PermissionError, match="name it with --trust"):
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
