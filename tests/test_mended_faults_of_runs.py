"""Faults that users found in the commands, each as a test of the correct outcome."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from jaxcl.compare import compare
from jaxcl.configs import tfds_pairs
from jaxcl.run.metric_writer import read_metrics
from jaxcl.search import main as search
from jaxcl.train import train

pytestmark = pytest.mark.usefixtures("unchecked_annotations")

ROOT = Path(__file__).parents[1]
NUM_ROWS = 40


class Questions(tfds.core.GeneratorBasedBuilder):
    """Rows with several fields, not all of them usable as a side of a pair."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text
        features = {"question": text(), "answer": text(), "latin": text(), "emoji": text()}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                features | {"number": tfds.features.Scalar(np.int64)}
            ),
        )

    def _split_generators(self, _):
        return {"train": self._generate_examples(NUM_ROWS), "dev": self._generate_examples(2)}

    def _generate_examples(self, count):
        for row in range(count):
            yield (
                row,
                {
                    "question": f"the square of {row}",
                    "answer": f"it is {row**2}",
                    "latin": b"caf\xe9" if row == 3 else "tea",
                    "emoji": "🙂" * (row + 1),
                    "number": row,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("questions")
    Questions(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture
def config() -> ConfigDict:
    """A small run without data."""
    return tfds_pairs.get_config()


@pytest.fixture(scope="module")
def small_config(data_dir):
    """A run of 2 steps, with changes."""

    def changed(**changes) -> ConfigDict:
        config = tfds_pairs.get_config()
        config.update_from_flattened_dict(
            {
                "data.name": "questions:1.0.0",
                "data.query_field": "question",
                "data.key_field": "answer",
                "data.splits.train": "train",
                "data.splits.validation": "dev[:1]",
                "data.vocabulary_size": 100,
                "evaluation.methods": ("dense",),
                "global_batch_size": 16,
                "model.dim": 8,
                "run.data_dir": str(data_dir),
                "steps": 2,
            }
            | changes
        )
        return config

    return changed


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """The workdir of a run that evaluated on one query."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(small_config(), workdir)
    return workdir


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss.margin", float("nan")),
        ("loss.relative_margin", 5.0),
        ("optimizer.clip_norm", -1.0),
        ("evaluation.methods", ("bm52",)),
        ("evaluation.methods", ()),
        ("evaluation.rrf_k", -1),
        ("seed", 2**63),
    ],
)
def test_an_invalid_setting_is_refused_before_data_are_read(config, tmp_path, setting, value):
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - matched below
        train(config, tmp_path / "run")
    assert setting in str(caught.value)


def test_held_out_keys_without_words_are_refused_before_the_first_step(small_config, tmp_path):
    changes = {"data.key_field": "emoji", "evaluation.methods": ("bm25", "dense")}
    with pytest.raises(ValueError, match="word"):
        train(small_config(**changes), tmp_path / "run")
    assert read_metrics(tmp_path / "run") == []


def test_a_field_that_holds_no_text_is_refused_by_name(small_config, tmp_path):
    with pytest.raises(ValueError, match="number"):
        train(small_config(**{"data.key_field": "number"}), tmp_path / "run")


def test_a_text_that_is_not_utf_8_is_refused_with_its_field_and_row(small_config, tmp_path):
    with pytest.raises(ValueError, match="utf-8") as caught:
        train(small_config(**{"data.key_field": "latin"}), tmp_path / "run")
    assert "latin" in str(caught.value)
    assert "row" in str(caught.value)


def test_a_query_that_is_not_unicode_ends_the_search_with_an_error_line(trained):
    with pytest.raises(SystemExit) as caught:
        search([f"--workdir={trained}", "\udcff\udcfe broken"])
    assert caught.value.code == 1


@pytest.mark.parametrize("changes", [None, 5, "seed", ["seed"]])
def test_compared_settings_must_be_mappings(config, tmp_path, changes):
    with pytest.raises(ValueError, match=r"'a'.* give a mapping"):
        compare(config, {"a": changes}, tmp_path)


@pytest.mark.parametrize("settings", [None, ["a"], "a", {}])
def test_the_compared_settings_must_be_a_mapping(config, tmp_path, settings):
    with pytest.raises(ValueError, match=r"give (a mapping|at least one)"):
        compare(config, settings, tmp_path)


def test_the_results_of_one_query_are_json(trained):
    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    results = json.loads((trained / "results.json").read_text(), parse_constant=refuse)
    assert results["rows"]["validation"] == 1


def run_python(*arguments: str, directory: Path, **environment: str) -> str:
    """Run the interpreter; return its output, including errors."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return finished.stdout


def test_a_workdir_may_begin_with_a_tilde(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "run").write_text("no folder")
    config = ROOT / "configs" / "tfds_pairs.py"
    command = ("-m", "jaxcl.train", f"--config={config}", "--workdir=~/run")
    printed = run_python(*command, directory=tmp_path, HOME=str(home))
    assert f"the workdir {home / 'run'} cannot be created" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


OWN_FLAG = """
from absl import flags
flags.DEFINE_string("workdir", "x", "of the user's program")
from jaxcl.train import train
print("imported")
"""
OWN_MAIN = """
from absl import app
from jaxcl.train import train
app.run(lambda argv: print("imported"))
"""


@pytest.mark.parametrize("program", [OWN_FLAG, OWN_MAIN], ids=["own flag", "own main"])
def test_a_program_that_defines_flags_can_import_train(program, tmp_path):
    assert run_python("-c", program, directory=tmp_path).endswith("imported\n")


def test_a_run_may_train_in_a_thread(small_config, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        results = pool.submit(train, small_config(), tmp_path / "run").result()
    assert results["steps"] == 2
