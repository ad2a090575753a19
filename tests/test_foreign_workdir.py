"""Opening a workdir from someone else imports nothing that it names."""

import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxcl import evaluate, mine, search, topics
from jaxcl.configs import code_search, tfds_pairs
from jaxcl.data.prepare import prepare_data
from jaxcl.host.block_file import BlockFile
from jaxcl.host.npz import read_npz
from jaxcl.run import pool_index
from jaxcl.run.checkpoint import Checkpoints
from jaxcl.run.opened import open_run
from jaxcl.run.workdir import claim_workdir, read_config
from jaxcl.settings.read import read_settings
from tests.helpers import record_of, training_of
from tests.prepared_data import Trap, make_hostile, prepare_pairs, read_by_tfds

trap_numbers = itertools.count(1_000)

COMMANDS = {
    "search": lambda workdir: search.main(["--workdir", str(workdir), "query"]),
    "evaluate": lambda workdir: evaluate.main(["--model", str(workdir)]),
    "mine": lambda workdir: mine.main(["--workdir", str(workdir)]),
    "topics": lambda workdir: topics.main(["--workdir", str(workdir)]),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_pairs(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def config(prepared, tmp_path):
    config = tfds_pairs.get_config("smoke")
    config.data.name = str(prepared)
    config.data.vocabulary_size = 300
    config.run.data_dir = str(tmp_path / "data")
    return config


@pytest.fixture
def workdir(config, tmp_path):
    """A run with data and without a checkpoint."""
    workdir = tmp_path / "workdir"
    claim_workdir(workdir, read_settings(config))
    prepare_data(read_settings(config).data, data_dir=tmp_path / "data", workdir=workdir)
    return workdir


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return Trap(tmp_path, next(trap_numbers))


@pytest.fixture
def hostile(prepared, tmp_path, trap) -> Path:
    """A prepared data set whose features name the trap."""
    hostile = shutil.copytree(prepared, tmp_path / "hostile")
    make_hostile(hostile, "in a dict", trap.class_name)
    return hostile


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def name_in_data_json(workdir, hostile):
    change_json(workdir / "data.json", lambda content: content.update(data_set=str(hostile)))


def concatenate_in_config_json(workdir, hostile):
    other = {"name": str(hostile), "splits": {"train": "dev"}}
    change_json(
        workdir / "config.json",
        lambda content: content["data"].update(concatenated={"other": other}),
    )


def save_checkpoint(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, training_of(read_config(workdir)).init(), record_of(workdir))


@pytest.mark.parametrize("change", [name_in_data_json, concatenate_in_config_json])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_a_class_that_a_workdir_names(
    workdir, hostile, trap, capsys, change, command
):
    change(workdir, hostile)
    save_checkpoint(workdir)
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command](workdir)
    assert not trap.sprung
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert f"names the feature class '{trap.class_name}'" in error
    read_by_tfds(hostile)  # shows that the trap works
    assert trap.sprung


@pytest.mark.parametrize("command", COMMANDS)
def test_a_harmless_workdir_is_opened(workdir, capsys, command):
    with pytest.raises(SystemExit):
        COMMANDS[command](workdir)
    assert "has not saved a checkpoint yet" in capsys.readouterr().err


def test_training_imports_nothing_either(config, workdir, hostile, trap, tmp_path):
    config.data.name = str(hostile)
    with pytest.raises(ValueError, match="names the feature class"):
        prepare_data(read_settings(config).data, data_dir=tmp_path, workdir=tmp_path)
    # A run of code pairs reads its folder from data.json.
    name_in_data_json(workdir, hostile)
    data = read_settings(code_search.get_config("smoke")).data
    with pytest.raises(ValueError, match="names the feature class"):
        prepare_data(data, data_dir=tmp_path, workdir=workdir)
    assert not trap.sprung


@pytest.mark.parametrize("name", ["huggingface:trap", "trap", "./trap", "trap/module=trap"])
def test_a_folder_with_a_program_is_not_a_data_set(workdir, trap, monkeypatch, name):
    folder = workdir.parent / "trap"
    folder.mkdir()
    for file in ("__init__.py", "trap.py", "trap_dataset_builder.py"):
        shutil.copy(workdir.parent / f"{trap.module}.py", folder / file)
    monkeypatch.chdir(workdir.parent)
    change_json(workdir / "data.json", lambda content: content.update(data_set=name))
    save_checkpoint(workdir)
    with pytest.raises(ValueError, match=r"not prepared|neither a directory|no prepared data set"):
        open_run(workdir).sources()
    assert not trap.sprung


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"data_set": 3, "fingerprints": {}}', '{"data_set": "a"}']
)
def test_damaged_data_of_a_checkpoint_are_named(workdir, content):
    record = record_of(workdir) | {"data": json.loads(content or "null")}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, training_of(read_config(workdir)).init(), record)
    with pytest.raises(ValueError, match=r"checkpoints is damaged \(it lacks the data set"):
        open_run(workdir)


@pytest.mark.parametrize("content", ["[]", "3", "!!python/object/apply:os.getcwd []"])
def test_a_config_of_a_workdir_is_json(workdir, content):
    (workdir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        open_run(workdir)


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_arrays_are_not_unpickled(tmp_path):
    marker, path = tmp_path / "sprung", tmp_path / "arrays.npz"
    pickled = np.array([Touch(marker)], object)
    made_from = np.array(json.dumps({}))
    np.savez(path, keys=pickled, made_from=made_from)
    np.save(tmp_path / "rows.npy", pickled)
    (tmp_path / "rows.done.json").write_text('{"rows": 1}')
    assert pool_index._read_index(path, {}) is None
    with pytest.raises(ValueError, match="keys holds Python objects"):
        read_npz(path, ["keys"])
    block = BlockFile(tmp_path / "rows.npy", (1, 1), np.float32, writes=True)
    assert block.done == 0
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists()
