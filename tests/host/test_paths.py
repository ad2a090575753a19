"""Paths from users: `~` is expanded, and a URL never becomes a local folder."""

from pathlib import Path

import pytest

from jaxcl import compare, embed, evaluate, mine, search, topics
from jaxcl.bench.__main__ import main as bench
from jaxcl.data.modalities import _tokenizer_of_settings
from jaxcl.data.row_guides import guide_dim, read_guides
from jaxcl.data.row_topics import read_topics
from jaxcl.data.tfds_directory import find_directory
from jaxcl.host.command_flags import CommandParser, user_path
from jaxcl.host.paths import local_path
from jaxcl.run import training
from jaxcl.run.load_model import load
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.opened import open_run
from jaxcl.settings.config_files import load_config, read_settings_file
from jaxcl.settings.data_sections import DataSettings
from jaxcl.settings.derived import origin_of
from jaxcl.settings.read import read_settings
from jaxcl.settings.sections import ModelSettings
from jaxcl.train import _prepare, train
from jaxcl.train import main as train_command

URLS = ["ftp://host/run", "gopher://host/run", "file:///tmp/run", "FTP://host/run", "ftp:/host/run"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The working directory, in which nothing may be created."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_not_a_local_path(url):
    for given in (url, Path(url)):
        with pytest.raises(ValueError, match=r"host/run|tmp/run") as error:
            local_path(given)
        assert "is a URL, but a local path is needed; mount the bucket" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "a:b", "runs/gs:/a", "C:/runs", ".", "a b"])
def test_other_paths_stay_as_they_are(text):
    assert local_path(text) == Path(text)


def test_the_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/runs") == local_path(Path("~/runs")) == Path("/somewhere/runs")
    assert user_path("~") == Path("/somewhere")


def test_an_unknown_user_is_refused():
    with pytest.raises(ValueError, match=r"~no-such-user/runs names an unknown user"):
        local_path("~no-such-user/runs")


URL = "ftp://host/run"
FUNCTIONS = {
    "train": lambda: train(load_config("code_search:smoke"), Path(URL)),
    "compare": lambda: compare.compare(load_config("code_search:smoke"), {"a": {}}, Path(URL)),
    "open_run": lambda: open_run(Path(URL)),
    "load": lambda: load(URL),
    "embed, input": lambda: embed.embed("run", URL, "vectors.npy"),
    "embed, output": lambda: embed.embed("run", "texts.txt", URL),
    "evaluate": lambda: evaluate.evaluate(URL),
    "search": lambda: search.search(Path(URL), "query"),
    "mine": lambda: mine.mine(Path(URL), Path("mined.npz"), rule=mine.MiningRule()),
    "mine, out": lambda: mine.mine(Path("run"), Path(URL), rule=mine.MiningRule()),
    "topics": lambda: topics.topics(Path(URL), Path("topics.npz"), num_topics=2),
    "topics, out": lambda: topics.topics(Path("run"), Path(URL), num_topics=2),
    "read_metrics": lambda: read_metrics(Path(URL)),
    "load_config": lambda: load_config(URL),
    "read_settings_file": lambda: read_settings_file(URL),
    "data.tokenizer": lambda: _tokenizer_of_settings(DataSettings(tokenizer=URL)),
    "data.guides": lambda: read_guides(Path(URL), num_rows=1),
    "the width of data.guides": lambda: guide_dim(URL),
    "data.topics": lambda: read_topics(Path(URL), num_rows=1),
    "data.name": lambda: find_directory(URL, None),
    "run.data_dir": lambda: _prepare(read_settings({"run": {"data_dir": URL}}), Path("run"), None),
    "init_from": lambda: origin_of(URL),
    "model.pretrained": lambda: training.pretrained_sources(
        read_settings({})._replace(model=ModelSettings(pretrained=URL))
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_refuses_a_url(name):
    with pytest.raises(ValueError, match=r"ftp:/+host/run is a URL"):
        FUNCTIONS[name]()


COMMANDS = {
    "train": (train_command, ["--config=code_search:smoke", f"--workdir={URL}"]),
    "compare": (compare.main, ["--config=code_search", "--settings=a", f"--workdir={URL}"]),
    "search": (search.main, [f"--workdir={URL}", "query"]),
    "search, model": (search.main, [f"--model={URL}", "query"]),
    "embed": (embed.main, [f"--model={URL}", "--input=a.txt", "--output=a.npy"]),
    "embed, output": (embed.main, ["--model=run", "--input=a.txt", f"--output={URL}"]),
    "evaluate": (evaluate.main, [f"--model={URL}"]),
    "mine": (mine.main, [f"--workdir={URL}"]),
    "mine, out": (mine.main, ["--workdir=run", f"--out={URL}"]),
    "topics, out": (topics.main, ["--workdir=run", f"--out={URL}"]),
    "bench": (bench, ["assignment", f"--workdir={URL}"]),
    "bench, json": (bench, ["assignment", f"--json={URL}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_url_in_one_line(capsys, name):
    main, arguments = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: argument --")
    assert "ftp://host/run is a URL" in error


def test_a_flag_keeps_the_reason_of_the_refusal(capsys):
    parser = CommandParser("jaxcl.count", "Counts.")
    parser.add_argument("--place", type=user_path, help="a folder")
    with pytest.raises(SystemExit):
        parser.parse(["--place=~no-such-user"])
    assert "names an unknown user; give the full path" in capsys.readouterr().err
