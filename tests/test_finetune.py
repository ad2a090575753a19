"""Fine-tuning from a pretrained folder, which is needed only by the first start of a run."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from jaxcl import search
from jaxcl.check_grad import compare_gradients
from jaxcl.configs import finetune
from jaxcl.data.prepare import RunData
from jaxcl.models.pretrained.folder import read_pretrained
from jaxcl.plan import make_plan
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.initial import copy_prepared_files, keep_pretrained_files, with_initial_towers
from jaxcl.run.opened import open_run
from jaxcl.run.opening import run_warnings
from jaxcl.run.training import build_training
from jaxcl.run.workdir import claim_workdir
from jaxcl.settings.pretrained import is_copy
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.helpers import bits, final_state
from tests.host.test_processes import Run, assert_close_runs
from tests.models.pretrained.tiny import write_tiny_bert, write_tiny_static
from tests.prepared_data import prepare_pairs

LIBRARY = {"prompts": {"query": "query : ", "document": "key : "}, "similarity_fn_name": "dot"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("prepared"))


def config_with(prepared, **changes) -> ConfigDict:
    """`configs/finetune.py:smoke` on 20 rows, in 4 steps."""
    config = finetune.get_config("smoke")
    small = {
        "steps": 4,
        "data.name": str(prepared),
        "data.group_field": None,
        "data.metadata_fields": (),
        "data.splits": ConfigDict({"train": "train", "validation": "dev"}),
        "run.data_dir": str(prepared.parent),
        "run.log_every": 1,
        "run.checkpoint_every": 2,
        "grad_cache.chunk_size": None,
    }
    config.update_from_flattened_dict(small | changes)
    return config


class Interrupted(Exception):
    """Raised right after a run saves a checkpoint."""


def train_until(step, config, workdir):
    """Train, and stop right after a step is saved."""
    save = Checkpoints.save

    def save_and_die(self, saved, state, record):
        save(self, saved, state, record)
        if saved == step:
            self.wait()
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Interrupted):
            train(config, workdir)


class Runs(NamedTuple):
    """Two finished runs with the same config, and their deleted folder."""

    config: ConfigDict
    whole: Path
    resumed: Path


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """A run without interruption, and one that was resumed without its folder."""
    folder = write_tiny_static(tmp_path_factory.mktemp("tiny"), library=LIBRARY)
    config = config_with(prepared, **{"model.pretrained": str(folder)})
    whole, resumed = (tmp_path_factory.mktemp(name) for name in ("whole", "resumed"))
    train(config, whole)
    train_until(2, config, resumed)
    shutil.rmtree(folder)
    train(config, resumed)
    return Runs(config, whole, resumed)


def test_a_resumed_run_needs_no_folder_and_is_bitwise_the_same(runs):
    whole, resumed = (final_state(path, step=4) for path in (runs.whole, runs.resumed))
    assert jax.tree.map(bits, resumed) == jax.tree.map(bits, whole)


def test_a_copied_workdir_opens_and_searches_without_the_folder(runs, tmp_path, capsys):
    workdir = shutil.copytree(runs.resumed, tmp_path / "copied")
    opened = open_run(workdir)
    assert opened.settings.data.prompts.query == "query : "
    vectors = opened.encoder.encode("query", ["file 1", "read 2"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    search.main(["--workdir", str(workdir), "query 21"])
    assert "key 2" in capsys.readouterr().out


def test_a_changed_copy_is_refused(runs, tmp_path):
    workdir = shutil.copytree(runs.resumed, tmp_path / "changed")
    library = workdir / "pretrained" / "config_sentence_transformers.json"
    library.write_text(json.dumps(LIBRARY | {"similarity_fn_name": "cosine"}))
    for use in (lambda: open_run(workdir), lambda: train(runs.config, workdir)):
        with pytest.raises(ValueError, match=r"pretrained.* changed since the run began"):
            use()


def test_a_run_may_start_from_a_fine_tuned_one_and_keeps_its_files(runs, prepared, tmp_path):
    origin = shutil.copytree(runs.resumed, tmp_path / "origin")
    config = config_with(prepared, init_from=str(origin))
    settings = read_settings(config)
    state = with_initial_towers(settings, build_training(settings).init())
    trained = final_state(runs.resumed, step=4).params["towers"]
    assert jax.tree.map(bits, state.params["towers"]) == jax.tree.map(bits, trained)
    workdir = tmp_path / "new"
    workdir.mkdir()
    copy_prepared_files(settings, workdir)
    keep_pretrained_files(settings, workdir)
    shutil.rmtree(origin)
    resumed = read_settings(config, workdir=workdir)
    model, original = resumed.parts.pretrained["model"], settings.parts.pretrained["model"]
    assert model == original._replace(path=workdir / "pretrained")
    assert (workdir / "tokenizer.json").read_bytes() == model.files["tokenizer.json"]


def test_a_start_that_fails_leaves_no_copy(prepared, tmp_path):
    folder = write_tiny_static(tmp_path / "tiny")
    changes = {"model.pretrained": str(folder), "global_batch_size": 32}
    with pytest.raises(ValueError, match="20 rows, fewer than one batch of 32"):
        train(config_with(prepared, **changes), tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_another_tokenizer_in_the_workdir_is_not_overwritten(prepared, tmp_path):
    folder = write_tiny_static(tmp_path / "tiny")
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="differs from the tokenizer of the pretrained model"):
        train(config_with(prepared, **{"model.pretrained": str(folder)}), workdir)
    assert [path.name for path in workdir.iterdir()] == ["tokenizer.json"]


def test_a_user_s_folder_in_the_place_of_the_copy_is_kept(prepared, tmp_path):
    workdir = tmp_path / "workdir"
    folder = write_tiny_static(workdir / "pretrained")
    stored = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already exists, where the run keeps a copy"):
        train(config_with(prepared, **{"model.pretrained": str(folder)}), workdir)
    assert (folder / "model.safetensors").read_bytes() == stored


def test_an_interrupted_start_leaves_no_files_to_another_config(prepared, tmp_path):
    workdir, kept = tmp_path / "workdir", {}
    for name in ("first", "second"):
        library = {"prompts": {"query": name}}
        folder = write_tiny_static(tmp_path / name, library=library)
        settings = read_settings(config_with(prepared, **{"model.pretrained": str(folder)}))
        claim_workdir(workdir, settings)
        assert not (workdir / "pretrained").exists()
        keep_pretrained_files(settings, workdir)
        kept[name] = read_pretrained(workdir / "pretrained").prompts["query"]
    assert kept == {"first": "first", "second": "second"}


@pytest.mark.slow
def test_two_processes_with_sharded_parameters_fine_tune_as_one(prepared, tmp_path):
    folder = write_tiny_bert(tmp_path / "tiny")
    flags = {
        "steps": 2,
        "model.pretrained": folder,
        "data.name": prepared,
        "data.group_field": None,
        "data.metadata_fields": (),
        "data.splits.validation": "dev",
        "data.splits.test": "dev",
        "run.data_dir": tmp_path / "data",
        "run.log_every": 1,
        "run.mesh.fsdp": 2,
        "run.parameter_rules": (("kernel", 0),),
        "evaluation.methods": "('dense',)",
    }
    command = [sys.executable, "-m", "jaxcl.train", "--config", "finetune:smoke"]
    command += [f"--config.{field}={value}" for field, value in flags.items()]
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        arguments = [*command, f"--workdir={workdir}"]
        Run(arguments, processes=processes, devices=4 // processes).finish()
    assert_close_runs(tmp_path / "2", tmp_path / "1", tolerance=1e-5)
    assert is_copy(tmp_path / "2" / "pretrained")


def test_a_plan_counts_the_parameters_of_the_folder(prepared, tmp_path):
    folder = write_tiny_static(tmp_path)
    settings = read_settings(config_with(prepared, **{"model.pretrained": str(folder)}))
    plan = make_plan(settings, jax.devices(), num_rows=20)
    stored = load_file(folder / "model.safetensors")
    assert plan.parameters == 4 * (stored["embedding.weight"].size + 1)  # and the temperature


@pytest.mark.slow
def test_the_gradients_of_a_pretrained_encoder_agree_on_the_mesh(prepared, tmp_path):
    folder = write_tiny_bert(tmp_path, num_layers=2)
    changes = {"model.pretrained": str(folder), "grad_cache.chunk_size": 1}
    comparisons = compare_gradients(read_settings(config_with(prepared, **changes)))
    assert all(one.agrees for one in comparisons), comparisons
    assert any("token_table" in one.parameter for one in comparisons)


def test_a_model_with_vectors_of_any_norm_gives_a_warning(tmp_path):
    data = {"max_tokens": {"query": 8, "key": 8}}
    data_of_rows = RunData({}, {"train": SimpleNamespace(num_rows=20)}, {})
    expected = {True: 0, False: 1}
    for normalize, count in expected.items():
        folder = tmp_path / str(normalize)
        write_tiny_static(folder, normalize=normalize, library=LIBRARY)
        settings = read_settings({"model": {"pretrained": str(folder)}, "data": data})
        assert len(list(run_warnings(settings, data_of_rows, {}, None))) == count
