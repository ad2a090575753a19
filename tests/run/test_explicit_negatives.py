"""Runs on rows with text negatives: checks of settings, messages, and resuming."""

import json
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcl.data.row_negatives import RowNegatives
from jaxcl.data.text_negatives import TextNegatives
from jaxcl.ops.mesh import make_mesh
from jaxcl.plan import _abstract_batch, make_plan
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.explicit_negatives import (
    check_explicit_negatives,
    negatives_summary,
    negatives_warnings,
)
from jaxcl.run.metric_writer import read_metrics
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.helpers import bits, training_of, unclocked
from tests.host.test_processes import Run, assert_close_runs

SOURCE = """
from jaxcl.data.sources import InMemoryPairs

WORDS = ["red", "green", "blue", "black", "white", "pink", "brown", "grey"]


def open_split(role):
    pairs = [(first, second) for first in WORDS for second in WORDS]
    queries = [f"{first} {second}" for first, second in pairs]
    keys = [f"the colour {first} {second}" for first, second in pairs]
    negatives = [
        [f"the colour {second} {first}", *[f"no colour {first}"] * (row % 3)]
        if row % 4
        else []
        for row, (first, second) in enumerate(pairs)
    ]
    scores = [[2.0] + [0.1 * row] * len(texts) for row, texts in enumerate(negatives)]
    metadata = {"negatives": negatives, "teacher_scores": scores}
    return InMemoryPairs(queries, keys, metadata=metadata if role == "train" else {})
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that returns the config of a small run on these rows, with changes."""
    (tmp_path / "own_negatives.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)

    def changed(**changes):
        settings = ConfigDict(
            {
                "steps": 4,
                "global_batch_size": 16,
                "data": {
                    "name": "own_negatives:open_split",
                    "splits": {"train": "train", "validation": "validation"},
                    "vocabulary_size": 300,
                    "max_tokens": {"query": 6, "key": 8},
                },
                "model": {"dim": 8, "options": {"max_tokens": 8}},
                "loss": {"masks": ("row", "text")},
                "evaluation": {"methods": ("dense",)},
                "run": {
                    "data_dir": str(tmp_path / "data"),
                    "log_every": 1,
                    "evaluate_every": 2,
                    "checkpoint_every": 2,
                },
            }
        )
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            node = settings
            for part in section.split("__"):
                if part not in node:
                    node[part] = {}
                node = node[part]
            node[field] = value
        return settings

    return changed


def negatives(counts=(2, 0, 40), **fields):
    """Negatives of three rows, with lists of these lengths."""
    texts = type("Texts", (), {"num_rows": 7})()
    given = {"per_row": max(counts), "num_own": 0} | fields
    offsets = np.append(0, np.cumsum(counts))
    return TextNegatives(texts, offsets, np.zeros(sum(counts), int), {}, **given)


def test_rows_with_negatives_are_trained_on_and_reported(config, tmp_path, capsys):
    train(config(), tmp_path / "run")
    counts = [1 + row % 3 for row in range(64) if row % 4]
    wanted = f"negatives: 48 training rows have {np.mean(counts):.1f} on average, {48 + 8} distinct"
    assert wanted in capsys.readouterr().err
    metrics = read_metrics(tmp_path / "run")
    [*_, last] = [one for one in metrics if "negatives/explicit/counted" in one]
    # 16 lists, every fourth empty; every query is compared with all of them.
    met = last["negatives/explicit/counted"] + last["negatives/explicit/masked"]
    assert 12 < met < 16 * 3


@pytest.mark.slow
def test_negatives_change_the_loss_and_none_per_row_is_a_run_without(config, tmp_path):
    losses = []
    for given in (None, 1, 0):
        workdir = tmp_path / f"run {given}"
        train(config(data__negatives_per_row=given), workdir)
        losses.append([one["loss"] for one in read_metrics(workdir) if "loss" in one])
    assert losses[0][0] > losses[1][0] > losses[2][0] + 0.1


class _Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "distillation", "loss__masks": (), "grad_cache__chunk_size": 3},
        {
            "loss__exchange": "ring",
            "loss__margin": 0.0,
            "negatives__bank__kind": "queue",
            "negatives__bank__slots": 32,
            "negatives__tiers__uniform": 8,
            "negatives__tiers__nearest": 2,
            "negatives__momentum_encoder__initial": 0.9,
            "negatives__guide": "momentum",
            "grad_cache__chunk_size": 1,
        },
        {"negatives__bank__kind": "instance", "negatives__tiers__full_bank": True},
    ],
    ids=["distillation", "queue and guide", "instance bank"],
)
def test_a_resumed_run_is_the_same_run(config, tmp_path, monkeypatch, changes):
    run = config(**changes)
    train(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        save = Checkpoints.save

        def stop(self, step, *arguments):
            save(self, step, *arguments)
            self.wait()
            raise _Interrupted

        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(_Interrupted):
            train(run, tmp_path / "halves")
    train(run, tmp_path / "halves")
    states = []
    for name in ("whole", "halves"):
        with Checkpoints(tmp_path / name / "checkpoints", read_only=True) as checkpoints:
            abstract = training_of(run).abstract_state(64, np.zeros(64, np.int32))
            states.append(checkpoints.restore_latest(abstract).state)
    assert jax.tree.map(bits, states[0]) == jax.tree.map(bits, states[1])
    assert unclocked(tmp_path / "whole") == unclocked(tmp_path / "halves")
    run.data.negatives_per_row = 1
    with pytest.raises(ValueError, match=r"data\.negatives_per_row is 1 here and None there"):
        train(run, tmp_path / "halves")


FILES = """
from jaxcl.configs import pairs

def get_config():
    config = pairs.get_config("smoke")
    config.steps, config.data.vocabulary_size, config.model.dim = 3, 400, 16
    config.global_batch_size, config.evaluation.methods = 16, ("dense",)
    config.data.name = "{folder}/mined.jsonl"
    config.loss.masks, config.loss.exchange = ("row", "text"), "ring"
    config.grad_cache.chunk_size = 3
    config.run.data_dir, config.run.log_every = "{folder}/data", 1
    return config
"""


@pytest.mark.slow
def test_two_processes_train_on_positives_and_negatives_of_a_file_as_one(tmp_path):
    records = [
        {
            "query": f"query {row}",
            "positives": [f"key {row} {place}" for place in range(1 + row % 2)],
            "negatives": [f"other {row + place}" for place in range(row % 4)],
        }
        for row in range(60)
    ]
    (tmp_path / "mined.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = tmp_path / "mined.py"
    config.write_text(FILES.format(folder=tmp_path))
    command = [sys.executable, "-m", "jaxcl.train", "--config", str(config)]
    for processes in (1, 2):
        arguments = [*command, f"--workdir={tmp_path / str(processes)}"]
        Run(arguments, processes=processes, devices=4 // processes).finish()
    assert_close_runs(tmp_path / "2", tmp_path / "1", tolerance=1e-5)
    metrics = [one for one in read_metrics(tmp_path / "2") if "negatives/explicit/counted" in one]
    assert metrics
    assert all(one["negatives/explicit/counted"] > 8 for one in metrics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "distillation", "masks": ()}}, None),
        ({}, None),
        (
            {"negatives": {"bank": {"kind": "instance"}, "mined": {"refresh_every": 2}}},
            r"mined\.refresh_every mines others; set it to None, or set",
        ),
        (
            {
                "negatives": {"guide": "data"},
                "data": {"guides": "some.npz"},
                "loss": {"margin": 0.0},
            },
            r"but not of their negatives; set negatives\.guide='momentum', or set",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    settings = read_settings({"steps": 9, **changes})
    if message is None:
        check_explicit_negatives(settings, negatives())
        return
    with pytest.raises(ValueError, match=message):
        check_explicit_negatives(settings, negatives())
    check_explicit_negatives(settings, None)


def test_a_loss_without_explicit_negatives_is_named():
    settings = read_settings({})
    part = settings.parts.loss._replace(negatives=())
    settings = settings._replace(parts=settings.parts._replace(loss=part))
    with pytest.raises(ValueError, match=r"'infonce' takes no explicit negatives; set data\.neg"):
        check_explicit_negatives(settings, negatives())
    check_explicit_negatives(settings, None)


def test_a_loss_with_a_teacher_needs_negatives():
    settings = read_settings({"loss": {"name": "distillation", "masks": ()}})
    with pytest.raises(ValueError, match="give the rows negatives and teacher_scores, or set"):
        check_explicit_negatives(settings, None)
    of_file = RowNegatives(np.zeros((3, 1), int), np.zeros((3, 2), np.float32), "")
    check_explicit_negatives(settings, of_file)


@pytest.mark.parametrize(
    ("changes", "fields", "wanted"),
    [
        ({}, {}, ["padded to 40 negatives, the length of the longest list, but the mean is 14.0"]),
        ({"data": {"negatives_per_row": 40}}, {}, []),
        ({}, {"counts": (2, 0, 16)}, []),
        (
            {},
            {"counts": (2, 0, 16), "num_own": 3},
            ["3 negatives have the same text as a positive or the query of their row; add 'text'"],
        ),
        ({"loss": {"masks": ("row", "text")}}, {"counts": (2,), "num_own": 3}, []),
        (
            {"loss": {"name": "distillation", "masks": ()}},
            {"counts": (2,), "num_own": 3},
            [],
        ),
    ],
)
def test_many_negatives_and_negatives_that_are_positives_are_warned_of(changes, fields, wanted):
    found = list(negatives_warnings(read_settings(changes), negatives(**fields)))
    assert len(found) == len(wanted)
    assert all(part in text for part, text in zip(wanted, found, strict=True))


def test_the_summary_counts_what_is_trained_on():
    assert negatives_summary(negatives((2, 0, 4))) == (
        "; negatives: 2 training rows have 3.0 on average, 7 distinct texts"
    )
    cut = negatives_summary(negatives((2, 0, 4), per_row=1))
    assert "2 training rows have 1.0 on average" in cut
    assert negatives_summary(None) == ""


def test_a_plan_counts_them_if_their_number_is_set():
    small = {"global_batch_size": 8, "model": {"dim": 8}, "data": {"vocabulary_size": 50}}
    scored = small | {"loss": {"name": "distillation", "masks": ()}}
    with pytest.raises(ValueError, match=r"set data\.negatives_per_row to their number"):
        make_plan(read_settings(scored), jax.devices(), num_rows=8)
    mesh = make_mesh({"data": 8})
    batches = [
        _abstract_batch(
            read_settings(settings | {"data": small["data"] | {"negatives_per_row": count}}), mesh
        )
        for settings, count in ((small, None), (small, 3), (scored, 3))
    ]
    assert "negatives" not in batches[0]
    for batch in batches[1:]:
        assert batch["negatives"]["inputs"]["tokens"].shape == (8, 3, 128)
        assert {batch["negatives"][name].shape for name in ("valid", "row", "text")} == {(8, 3)}
    assert "teacher_scores" not in batches[1]
    assert batches[2]["teacher_scores"].shape == (8, 1 + 3)
