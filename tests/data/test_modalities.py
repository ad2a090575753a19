"""The files in a workdir that inputs depend on stay as they were recorded."""

import json

import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.data.modalities import check_inputs, input_fingerprints, open_tables
from jaxcl.data.prepare import prepare_data
from jaxcl.data.sources import InMemoryPairs
from jaxcl.settings.read import read_settings

PAIRS = InMemoryPairs(["add one", "sub two"], ["return a + 1", "return b - 2"])


@pytest.fixture
def data():
    config = get_config("smoke").data
    config.update({"name": "memory", "vocabulary_size": 300})
    config.splits = {"train": "train"}
    return read_settings({"data": config.to_dict()}).data


def prepare(data, workdir):
    workdir.mkdir(exist_ok=True)
    return prepare_data(
        data, data_dir=workdir.parent, workdir=workdir, open_source=lambda role: PAIRS
    )


def swap_two_ids(workdir):
    path = workdir / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def test_a_run_does_not_resume_with_another_tokenizer(data, tmp_path):
    prepare(data, tmp_path / "run")
    prepare(data, tmp_path / "run")  # the same one
    swap_two_ids(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"tokenizer\.json in .*run has changed since .*restore it"
    ):
        prepare(data, tmp_path / "run")


def test_no_command_reads_another_tokenizer(data, tmp_path):
    prepare(data, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())["fingerprints"]
    check_inputs(data, tmp_path / "run", recorded)
    assert recorded.items() >= input_fingerprints(data, tmp_path / "run").items()
    swap_two_ids(tmp_path / "run")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        check_inputs(data, tmp_path / "run", recorded)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        open_tables(data, {}, data_dir=tmp_path, workdir=tmp_path / "run", recorded=recorded)


def test_a_lost_tokenizer_is_trained_again_if_it_is_the_same(data, tmp_path):
    prepare(data, tmp_path / "run")
    content = (tmp_path / "run" / "tokenizer.json").read_bytes()
    (tmp_path / "run" / "tokenizer.json").unlink()
    prepare(data, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == content
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json in .*run has changed"):
        prepare(data._replace(vocabulary_size=25), tmp_path / "run")


def test_a_workdir_of_an_earlier_version_opens_and_is_recorded_from_then_on(data, tmp_path):
    prepare(data, tmp_path / "run")
    path = tmp_path / "run" / "data.json"
    content = json.loads(path.read_text())
    content["fingerprints"] = {"train": content["fingerprints"]["train"]}
    path.write_text(json.dumps(content))
    prepare(data, tmp_path / "run")
    swap_two_ids(tmp_path / "run")
    with pytest.raises(ValueError, match=r"tokenizer\.json in .*run has changed"):
        prepare(data, tmp_path / "run")
