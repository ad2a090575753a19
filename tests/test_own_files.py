"""Train on a user's own files, then resume, evaluate, search and mine."""

import json

import pytest

from jaxcl import evaluate, mine, search
from jaxcl.configs import pairs
from jaxcl.run.opened import open_run
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.models.pretrained.tiny import DIM, write_tiny_bert

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TOPICS = ("sort a list", "open a file", "draw a line", "parse a date", "send a mail")


def records(count, first=0):
    """Questions that share a word only with their own answers."""
    return [
        {
            "question": f"how to {TOPICS[i % 5]} in way{i}",
            "answer": f"to {TOPICS[i % 5]} use way{i}",
        }
        for i in range(first, first + count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """`configs/pairs.py:smoke` on eight devices, smaller, with changes by dotted name."""
    data_dir = tmp_path_factory.mktemp("data")

    def changed(variant="smoke", **changes):
        config = pairs.get_config(variant)
        small = {"steps": 4, "global_batch_size": 16, "model.dim": 16}
        small |= {"data.vocabulary_size": 300, "run.data_dir": str(data_dir)}
        small |= {"data.splits.validation": "train[:30%]", "run.checkpoint_every": 2}
        config.update_from_flattened_dict(small | changes)
        return config

    return changed


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory):
    """A run on a file of 60 rows, and its results."""
    folder = tmp_path_factory.mktemp("trained")
    write_jsonl(folder / "pairs.jsonl", records(60))
    config = config_of(**{"data.name": str(folder / "pairs.jsonl")})
    return folder, config, train(config, folder / "run")


def test_a_file_trains_and_is_evaluated_on_its_held_out_rows(trained):
    _, _, results = trained
    assert sum(results["rows"].values()) == 60
    assert results["rows"]["validation"] >= 5
    assert results["metrics"]["validation"]["plain"]["bm25"]["mrr@10"]["mean"] > 0.9


def test_the_same_command_resumes_and_a_changed_file_is_refused(trained):
    folder, config, results = trained
    again = train(config, folder / "run")
    assert again["metrics"] == results["metrics"]
    write_jsonl(folder / "pairs.jsonl", records(61))
    with pytest.raises(ValueError, match=r"was trained on other data: .*pairs\.jsonl holds other"):
        train(config, folder / "run")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, or a data set .* no longer has the rows"):
        open_run(folder / "run").sources()
    write_jsonl(folder / "pairs.jsonl", records(60))
    assert len(open_run(folder / "run").sources()["validation"]) == results["rows"]["validation"]


def test_a_run_on_relative_paths_opens_from_another_folder(config_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", records(40))
    write_jsonl(tmp_path / "dev.jsonl", records(8, 40))
    files = {"data.name": "pairs.jsonl", "data.splits.validation": "dev.jsonl"}
    train(config_of(**files), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sources = open_run(tmp_path / "run").sources()
    assert {role: len(one) for role, one in sources.items()} == {"train": 40, "validation": 8}


def test_rows_of_a_program_train_as_their_file_does(trained, config_of, tmp_path):
    _, _, results = trained
    rows = (row for row in records(60))
    assert train(config_of(), tmp_path / "run", rows=rows)["metrics"] == results["metrics"]
    config = config_of()
    train(config, tmp_path / "both", rows={"train": records(40), "validation": records(8, 40)})
    sources = open_run(tmp_path / "both").sources()
    assert {role: len(source) for role, source in sources.items()} == {
        "train": 40,
        "validation": 8,
    }
    assert config.data.name is None
    with pytest.raises(ValueError, match=r"rows has the roles \['validation'\]; add 'train'"):
        train(config, tmp_path / "none", rows={"validation": records(8)})
    with pytest.raises(ValueError, match=r"data\.name='x\.csv' and rows are both given"):
        train(config_of(**{"data.name": "x.csv"}), tmp_path / "none", rows=records(8))


def test_a_small_file_says_which_batch_it_has_rows_for(config_of, tmp_path):
    write_jsonl(tmp_path / "few.jsonl", records(12))
    config = config_of(**{"data.name": str(tmp_path / "few.jsonl")})
    with pytest.raises(
        ValueError, match=r"fewer than one batch of 16; set global_batch_size to at"
    ):
        train(config, tmp_path / "run")


@pytest.fixture
def pretrained(config_of, tmp_path):
    """Configs of a variant with a small pretrained encoder and a file of 60 rows."""
    write_tiny_bert(tmp_path / "bert")
    write_jsonl(tmp_path / "pairs.jsonl", records(60))

    def config(variant):
        changes = {"data.max_tokens.query": 12, "data.max_tokens.key": 16, "model.dim": 512}
        changes |= {"data.vocabulary_size": 16_384, "evaluation.batch_size": 16}
        changes |= {"data.name": str(tmp_path / "pairs.jsonl")}
        return config_of(variant, **changes, **{"model.pretrained": str(tmp_path / "bert")})

    return config


def test_the_variant_for_fine_tuning_takes_a_pretrained_encoder(pretrained):
    settings = read_settings(pretrained("finetune"))
    assert settings.model.dim == DIM
    assert not settings.data.distinct_tokens
    with pytest.raises(ValueError, match=r"set model\.name='pretrained' \(configs/pairs\.py:finet"):
        read_settings(pretrained("default"))


@pytest.mark.slow
def test_a_pretrained_encoder_is_fine_tuned_on_a_file(pretrained, tmp_path):
    assert train(pretrained("finetune"), tmp_path / "run")["rows"]["train"] > 30


def test_a_run_on_a_file_is_evaluated_searched_and_mined(trained, tmp_path, capsys):
    folder, _, results = trained
    evaluate.main([f"--model={folder / 'run'}", f"--output={tmp_path / 'results.json'}"])
    evaluated = json.loads((tmp_path / "results.json").read_text())
    assert evaluated["rows"] == results["rows"]
    search.main([f"--workdir={folder / 'run'}", "--top=1", "to sort a list use way5"])
    mine.main([f"--workdir={folder / 'run'}", f"--out={tmp_path / 'negatives.npz'}"])
    assert (tmp_path / "negatives.npz").exists()
    assert "way" in capsys.readouterr().out
