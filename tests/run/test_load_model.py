"""`jaxcl.load` finds the model of a run, and refuses folders without a model."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcl
from jaxcl.evaluate import evaluate
from jaxcl.export import export
from jaxcl.run.best import Best
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.checkpoint_record import CheckpointError
from jaxcl.run.load_model import _trained_rules, is_run
from jaxcl.run.opened import open_run
from jaxcl.run.training import build_training
from jaxcl.run.workdir import read_config
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES
from tests.helpers import record_of
from tests.models.pretrained.tiny import write_tiny_static
from tests.run.test_checkpoint import biggest_file, truncate
from tests.small_models import small_run

TEXTS = ["key 3", "query 11 and key 5 and key 7 and query 9", "", "some other word"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run with an encoder for each side, and queries of up to three tokens."""
    return small_run(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def model(workdir):
    return jaxcl.load(workdir)


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_run_s_model_embeds_as_its_evaluation_does(workdir, model, side):
    wanted = open_run(workdir).encoder.encode(side, TEXTS)
    assert np.abs(model.encode(TEXTS, side=side) - wanted).max() < 1e-6
    assert np.abs(model.encode(TEXTS[1], side=side) - wanted[1]).max() < 1e-6


def test_each_side_of_a_run_has_its_own_limit(model):
    assert model.max_tokens == {"query": 3, "key": 12}
    assert model.dim == 16
    assert model.normalizes
    assert list(map(len, model.tokenize([TEXTS[1]] * 2, side="query"))) == [3, 3]
    assert len(model.tokenize(TEXTS[1], side="key")) > 3


def test_each_of_two_pretrained_encoders_has_its_own_limit(tmp_path):
    folder = write_tiny_static(tmp_path / "tiny")
    towers = {"pretrained": str(folder), "key": {"pretrained": str(folder)}}
    for shared, wanted in {False: 5, True: 9}.items():
        model = towers | {"shared": False} if not shared else {"pretrained": str(folder)}
        data = {"max_tokens": {"query": 5, "key": 9}}
        rules = _trained_rules(read_settings({"model": model, "data": data}))
        assert {side: rule.max_tokens for side, rule in rules.items()} == {
            "query": wanted,
            "key": 9,
        }


def test_an_exported_folder_embeds_as_its_run(workdir, model, tmp_path):
    exported = jaxcl.load(export(workdir, tmp_path / "model", format="jaxcl"))
    for side in SIDES:
        difference = exported.encode(TEXTS, side=side) - model.encode(TEXTS, side=side)
        assert np.abs(difference).max() < 1e-6
    assert exported.max_tokens == model.max_tokens


def test_a_run_without_a_checkpoint_is_an_error(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints*"))
    with pytest.raises(ValueError, match="has not saved a checkpoint yet"):
        jaxcl.load(tmp_path / "run")


def test_the_error_for_a_folder_without_a_model_lists_the_expected_files(tmp_path):
    message = (
        r"neither checkpoints/ of a run, nor jaxcl\.json of an exported model, nor modules\.json"
    )
    with pytest.raises(ValueError, match=message):
        jaxcl.load(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        jaxcl.load(tmp_path / "absent")


def test_without_the_training_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(jaxcl, "missing_message", lambda: "needs flax: pip install 'jaxcl[train]'")
    with pytest.raises(ImportError, match=r"jaxcl\.load needs flax: pip install"):
        _ = jaxcl.load


def test_unknown_names_in_jaxcl_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        _ = jaxcl.encode


STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def evaluated(workdir, tmp_path_factory):
    """A run with different parameters at steps 1 to 3; step 1 is the best."""
    copy = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("checkpoints*"))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        abstract = build_training(read_settings(read_config(workdir))).abstract_state()
        state = checkpoints.restore_latest(abstract).state
    params, best = state.params, {"best": Best("validation/dense/mrr@10", 1, 0.5)._asdict()}
    with Checkpoints(copy / "checkpoints") as checkpoints:
        for step in STEPS:
            towers = jax.tree.map(lambda leaf, by=step: jnp.roll(leaf, by - 1), params["towers"])
            checkpoints.save(
                step, state._replace(params=params | {"towers": towers}), record_of(copy) | best
            )
    return copy


def test_the_path_of_a_checkpoint_loads_its_model(evaluated, model):
    newest = jaxcl.load(evaluated).encode(TEXTS, side="key")
    of_steps = [jaxcl.load(evaluated / "checkpoints" / str(step)) for step in STEPS]
    for step, loaded in zip(STEPS, of_steps, strict=True):
        assert loaded.source == str(evaluated / "checkpoints" / str(step))
    best = jaxcl.load(evaluated / "checkpoints" / "best")
    assert best.source == str(evaluated / "checkpoints" / "best")
    vectors = best.encode(TEXTS, side="key")
    assert vectors.tobytes() == model.encode(TEXTS, side="key").tobytes()
    assert vectors.tobytes() == of_steps[0].encode(TEXTS, side="key").tobytes()
    assert newest.tobytes() == of_steps[2].encode(TEXTS, side="key").tobytes()
    assert np.abs(newest - vectors).max() > 0.1


def test_the_best_checkpoint_is_exported_and_evaluated(evaluated, model, tmp_path):
    best = evaluated / "checkpoints" / "best"
    exported = jaxcl.load(export(best, tmp_path / "model", format="jaxcl"))
    assert np.abs(exported.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-6
    results = evaluate(best)
    assert results["model"] == str(best)
    assert results["metrics"] == evaluate(evaluated / "checkpoints" / "1")["metrics"]


def test_a_damaged_best_checkpoint_is_named_and_the_newest_is_loaded(evaluated, tmp_path, caplog):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    truncate(biggest_file(copy / "checkpoints" / "1"))
    with caplog.at_level(logging.WARNING):
        vectors = jaxcl.load(copy / "checkpoints" / "best").encode(TEXTS)
    assert vectors.tobytes() == jaxcl.load(evaluated).encode(TEXTS).tobytes()
    [warning] = [text for text in caplog.messages if text.startswith("the checkpoint of step")]
    assert warning.startswith("the checkpoint of step 1 is damaged (its file ")
    assert warning.endswith("step 3 is restored instead")
    with pytest.raises(CheckpointError, match="step 1: its file "):
        jaxcl.load(copy / "checkpoints" / "1")  # exactly this step was requested


def test_a_best_checkpoint_that_is_gone_is_named(evaluated, tmp_path, caplog):
    copy = shutil.copytree(evaluated, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "1")
    with caplog.at_level(logging.WARNING):
        jaxcl.load(copy / "checkpoints" / "best")
    assert "the checkpoint of step 1 is damaged (" in caplog.text


def test_a_run_without_a_best_checkpoint_says_what_would_keep_one(workdir):
    message = "no best checkpoint is known .*evaluation.best_metric was not set"
    with pytest.raises(ValueError, match=message):
        jaxcl.load(workdir / "checkpoints" / "best")


def test_a_model_in_a_folder_named_checkpoints_is_not_a_run(tmp_path):
    folder = write_tiny_static(tmp_path / "checkpoints" / "500")
    assert not is_run(folder)
    assert jaxcl.load(folder).encode(TEXTS).shape[0] == len(TEXTS)
