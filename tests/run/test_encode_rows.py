"""Data sets with their own prompts, from the config to training, search and evaluation."""

import json
import sys

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config
from ml_collections import ConfigDict

from jaxcl.data.code_pairs import prepare_code_pairs
from jaxcl.data.python_functions import SourceRoot
from jaxcl.evaluate import evaluate
from jaxcl.evaluation import held_out
from jaxcl.mine import mine
from jaxcl.negatives.mining import MiningRule
from jaxcl.run.encode_rows import encode_rows
from jaxcl.run.load_model import load
from jaxcl.run.opened import open_run
from jaxcl.search import open_search, search
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.host.test_processes import Run, assert_close_runs

NOUNS = ("socket", "ledger", "window", "folder", "matrix", "recipe", "planet", "violin")
VERBS = ("open", "close", "count", "merge", "split", "drop", "find", "paint", "lend", "weigh")
OWN = {"query": "find the code that can ", "key": "code: "}
FIRST, TRAINING, ROWS = 30, 60, 80


def functions(noun):
    for verb in VERBS:
        query = f"{verb.title()} the {noun} of a name."
        body = f"{noun} = find_{noun}(name)\n    found = {noun}.{verb}()"
        yield f'def {verb}_{noun}(name):\n    """{query}"""\n    {body}\n    return found\n'


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of three parts of one data set: the second with prompts, the third without any."""
    folder = tmp_path_factory.mktemp("prompts")
    for noun in NOUNS:
        package = folder / "site" / noun
        package.mkdir(parents=True)
        package.joinpath("__init__.py").write_text("\n\n".join(functions(noun)))
    pairs = prepare_code_pairs(
        folder / "data",
        roots=[SourceRoot(folder / "site")],
        test_packages=(),
        validation_fraction=0.0,
    )
    made = get_config("smoke")
    made.update_from_flattened_dict(
        {
            "steps": 3,
            "global_batch_size": 16,
            "model.dim": 16,
            "data.name": str(pairs.directory),
            "data.vocabulary_size": 400,
            "data.prompts.query": "query: ",
            "evaluation.methods": ("dense",),
            "run.data_dir": str(folder / "data"),
            "run.checkpoint_every": 2,
        }
    )

    def part(begin, middle, end):
        return {"train": f"train[{begin}:{middle}]", "validation": f"train[{middle}:{end}]"}

    fields = {"name": str(pairs.directory), "group_field": "group", "metadata_fields": ("name",)}
    with made.unlocked():
        made.data.metadata_fields = ("name",)
        made.data.splits = ConfigDict(part(0, 20, 26))
        made.data.concatenated = ConfigDict(
            {
                "b": fields | {"splits": part(26, 50, 56), "prompts": OWN},
                "c": fields | {"splits": part(56, 76, 80), "prompts": {"query": "", "key": ""}},
            }
        )
    return made


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The workdir of a finished run, and its results."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, train(config, workdir)


def encoded(model, source, side, ends):
    """The embedding of each row on its own, with the prompt of its data set in the text."""
    prompts = {"query": ("query: ", OWN["query"], ""), "key": ("", OWN["key"], "")}[side]
    return np.stack(
        [
            model.encode(record[side], side=side, prompt=prompts[int(np.searchsorted(ends, row))])
            for row, record in enumerate(source.read(range(len(source))), start=1)
        ]
    )


ENDS = {"train": [20, 44, 64], "validation": [6, 12, 16]}


@pytest.mark.parametrize("split", ENDS)
@pytest.mark.parametrize("side", ["query", "key"])
def test_stored_rows_are_embedded_with_the_prompt_of_their_data_set(run, split, side):
    workdir, _ = run
    opened, model = open_run(workdir), load(workdir)
    sources = opened.sources()
    source = sources[split]
    assert len(source) == ENDS[split][-1]
    wanted = encoded(model, source, side, ENDS[split])
    stored = opened.embeddings(split, source)[side]
    np.testing.assert_allclose(stored, wanted, atol=1e-6)
    texts = [record[side] for record in source.read(range(len(source)))]
    prompts = opened.prompts(sources)[split]
    found = encode_rows(model, texts, side=side, prompts=prompts)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    # Negative control: the run's own prompt gives other vectors.
    own = encode_rows(model, texts, side=side, prompts=None)
    first, second, _ = ENDS[split]
    np.testing.assert_allclose(own[:first], wanted[:first], atol=1e-6)
    assert np.abs(own[first:second] - wanted[first:second]).max(1).min() > 1e-3


def test_search_finds_keys_by_the_prompt_of_their_data_set(run):
    workdir, _ = run
    model, sources = load(workdir), open_run(workdir).sources()
    query = "Merge the ledger of a name."
    hits = search(workdir, query, top=80)
    keys = np.concatenate([encoded(model, sources[split], "key", ENDS[split]) for split in sources])
    scores = np.sort(keys @ model.encode(query))[::-1]
    np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)
    assert len(hits) == len({hit.record["key"] for hit in hits}) == ROWS
    again = open_search(workdir)(query, 80)  # from the index
    assert [hit.score for hit in again] == [hit.score for hit in hits]


def test_the_evaluation_of_a_run_and_of_its_model_agree(run):
    workdir, results = run
    found = evaluate(workdir)
    metrics = json.loads((workdir / "results.json").read_text())["metrics"]
    assert found["metrics"] == metrics == results["metrics"]
    assert metrics["validation"].keys() == {"plain", "name masked"}


def test_a_run_that_is_compared_has_the_prompts_of_its_own_rows_too(run):
    workdir, _ = run
    found = evaluate(workdir, against=workdir)
    assert found["against"]["metrics"] == found["metrics"]
    for variant in ("plain", "name masked"):
        for one in found["differences"]["validation"][variant]["dense"].values():
            assert one == {"difference": 0, "standard_error": 0, "interval": [0, 0]}


def test_keys_with_masked_names_keep_the_prompt_of_their_data_set(config, run, monkeypatch):
    workdir, _ = run
    settings, opened = read_settings(config), open_run(workdir)
    data = held_out.RunData(opened.sources(), {"validation": None}, {})
    noted = {}

    def evaluate_splits(settings, vectors, sources):
        texts = [record["key"] for record in sources["validation"].read(range(16))]
        noted["vectors"] = vectors.of_texts("validation", "key", texts)
        return {}, []

    monkeypatch.setattr(held_out, "evaluate_splits", evaluate_splits)
    monkeypatch.setattr(held_out, "held_out_summary", lambda *_: {})
    monkeypatch.setattr(held_out, "write_whole", lambda *_: None)
    monkeypatch.setattr(held_out, "write_npz", lambda *_: None)
    held_out.evaluate_run(settings, opened.encoder, data, workdir)
    source = opened.sources()["validation"]
    wanted = encoded(load(workdir), source, "key", ENDS["validation"])
    np.testing.assert_allclose(noted["vectors"], wanted, atol=1e-6)


def test_mining_compares_stored_rows_with_their_prompts(run, tmp_path):
    workdir, _ = run
    out = tmp_path / "mined.npz"
    mine(workdir, out, rule=MiningRule(per_query=2, rank_range=(0, 5)))
    source = open_run(workdir).sources()["train"]
    model = load(workdir)
    queries, keys = (encoded(model, source, side, ENDS["train"]) for side in ("query", "key"))
    positives = np.load(out)["teacher_scores"][:, 0]
    np.testing.assert_allclose(positives, (queries * keys).sum(1), atol=1e-5)


def test_other_prompts_make_another_run(config, run):
    workdir, _ = run
    changed = ConfigDict(config)
    with changed.unlocked():
        changed.data.concatenated.b.prompts.query = "another: "
    with pytest.raises(ValueError, match=r"data\.concatenated\.b\.prompts\.query"):
        train(changed, workdir)


MIXTURE = """
from ml_collections import ConfigDict
from jaxcl.configs import pairs

def get_config():
    config = pairs.get_config("smoke")
    config.steps, config.data.vocabulary_size, config.model.dim = 3, 400, 16
    config.global_batch_size, config.evaluation.methods = 16, ("dense",)
    config.data.name = "{folder}/first.jsonl"
    config.data.concatenated = ConfigDict({{
        "b": {{
            "name": "{folder}/second.jsonl",
            "splits": {{"train": "rest", "validation": "train[:25%]"}},
            "prompts": {{"query": "second: "}},
        }},
    }})
    config.assignment.name = "sourced"
    config.assignment.sourced.weights = (("first", 1.0), ("b", 3.0))
    config.run.data_dir, config.run.log_every = "{folder}/data", 1
    return config
"""


@pytest.mark.slow
def test_two_processes_train_on_two_files_by_weight_as_one(tmp_path):
    for name, count in (("first", 60), ("second", 40)):
        records = [{"query": f"{name} query {i}", "key": f"{name} key {i}"} for i in range(count)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = tmp_path / "mixture.py"
    config.write_text(MIXTURE.format(folder=tmp_path))
    command = [sys.executable, "-m", "jaxcl.train", "--config", str(config)]
    for processes in (1, 2):
        arguments = [*command, f"--workdir={tmp_path / str(processes)}"]
        Run(arguments, processes=processes, devices=4 // processes).finish()
    assert_close_runs(tmp_path / "2", tmp_path / "1", tolerance=1e-5)
    run = open_run(tmp_path / "2")
    assert run.prompts(run.sources())["train"].prompts["query"] == ("", "second: ")
