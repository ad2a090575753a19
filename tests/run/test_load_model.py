"""`jaxcl.load` finds the model of a run, and refuses folders without a model."""

import shutil

import numpy as np
import pytest

import jaxcl
from jaxcl.export import export
from jaxcl.run.load_model import _trained_rules
from jaxcl.run.opened import open_run
from jaxcl.settings.read import read_settings
from jaxcl.typing import SIDES
from tests.models.pretrained.tiny import write_tiny_static
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
    with pytest.raises(ValueError, match="has saved no checkpoint yet"):
        jaxcl.load(tmp_path / "run")


def test_the_error_for_a_folder_without_a_model_lists_the_expected_files(tmp_path):
    message = r"no checkpoints/ of a run, no jaxcl\.json of an exported model, and no modules\.json"
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
