"""A run that shows each query once per epoch, with another of its keys each time."""

import json

import numpy as np
import pytest

from jaxcl.configs import pairs
from jaxcl.run import batches
from jaxcl.train import train

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

NUM_QUERIES = 16


def test_an_epoch_has_each_query_once(tmp_path, capsys, monkeypatch):
    rows = [
        {
            "query": f"question q{number}",
            "positive": [f"answer q{number} a{i}" for i in range(size)],
        }
        for number, size in enumerate([1, 2, 3, 2] * (NUM_QUERIES // 4))
    ]
    query_of_row = [number for number, row in enumerate(rows) for _ in row["positive"]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {}

    class Spied(batches.OnePerLabel):
        def __call__(self, step):
            read[step] = super().__call__(step)
            return read[step]

    monkeypatch.setattr(batches, "OnePerLabel", Spied)
    config = pairs.get_config("smoke")
    small = {"steps": None, "epochs": 6.0, "global_batch_size": 8, "model.dim": 16}
    small |= {"data.name": str(tmp_path / "pairs.jsonl"), "data.vocabulary_size": 300}
    small |= {"run.data_dir": str(tmp_path / "data"), "assignment.name": "one_per_query"}
    config.update_from_flattened_dict(small)
    config.data.splits = {"train": "train"}
    config.data.distinct_tokens = False  # otherwise q1 and q11 would be equal
    with config.unlocked():
        config.steps = None
    train(config, tmp_path / "run")
    assert "6 epochs of 16 rows are 12 steps" in capsys.readouterr().err
    epochs = np.concatenate([read[step] for step in range(12)]).reshape(6, NUM_QUERIES)
    for epoch in epochs:
        assert sorted(query_of_row[row] for row in epoch) == list(range(NUM_QUERIES))
    assert sorted(np.unique(epochs)) == list(range(len(query_of_row)))  # all keys had their turn
    shown = np.bincount(epochs.ravel())
    sizes = np.bincount(query_of_row)[query_of_row]
    np.testing.assert_array_equal(shown, 6 // sizes)
