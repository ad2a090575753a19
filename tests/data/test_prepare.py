"""The data of a run: prepared once from the training split, and recorded in the workdir."""

from types import SimpleNamespace

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.data import prepare
from jaxcl.data import splits as run_splits
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.tokenizer import load_tokenizer, train_tokenizer
from jaxcl.settings.read import read_settings

TRAIN = {"queries": ["aaa aaa bbb", "bbb"], "keys": ["ccc ccc ccc", "ddd"], "groups": [5, 7]}
TEST = {"queries": ["eee"], "keys": ["fff"], "groups": [9]}


@pytest.fixture
def columns(monkeypatch):
    """The content of the splits, which a test may change."""
    splits = {"train": TRAIN, "validation": TEST, "test": TEST}

    def open_pairs(name, split, *, group_field, **_):
        groups = {} if group_field is None else {"groups": splits[split]["groups"]}
        return InMemoryPairs(splits[split]["queries"], splits[split]["keys"], **groups)

    monkeypatch.setattr(run_splits, "open_pairs", open_pairs)
    return splits


@pytest.fixture
def prepared(tmp_path, columns):
    """Prepare the data of one workdir, with changes to `config.data`."""
    (tmp_path / "run").mkdir()

    def prepare_with(*, batch_size=1, **changes):
        config = get_config("smoke").data
        config.update({"name": "memory", "vocabulary_size": 300} | changes)
        data = read_settings({"data": config.to_dict()}).data
        folders = {"data_dir": tmp_path, "workdir": tmp_path / "run"}
        return prepare.prepare_data(data, batch_size=batch_size, **folders)

    return prepare_with


def tokenizer_of(run_data, tmp_path):
    assert run_data.tables
    return load_tokenizer(tmp_path / "run" / "tokenizer.json")


def test_the_tokenizer_knows_both_sides_of_the_training_split_and_no_other(prepared, tmp_path):
    vocabulary = tokenizer_of(prepared(), tmp_path).get_vocab()
    for letter, known in dict.fromkeys("abcd", True).items() | dict.fromkeys("ef", False).items():
        assert any(letter * 3 in token for token in vocabulary) == known, letter


def test_the_tables_keep_groups_and_each_token_once(prepared):
    table = prepared(distinct_tokens=True).tables["train"]
    assert table.group.tolist() == [5, 7]
    for side, lengths in {"query": [2, 1], "key": [1, 1]}.items():
        tokens = table.side(side, np.arange(2))["tokens"]
        assert (tokens > 0).sum(1).tolist() == lengths


def test_fewer_rows_than_a_batch_are_an_error_before_texts_become_tokens(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "open_tables", None)  # which trains a tokenizer
    with pytest.raises(ValueError, match=r"has 2 rows, fewer than one batch of 3; set global_batc"):
        prepared(batch_size=3)
    assert not [*(tmp_path / "run").iterdir()]
    with pytest.raises(TypeError):
        prepared(batch_size=2)


def test_a_row_without_a_score_is_an_error_before_texts_become_tokens(prepared, monkeypatch):
    monkeypatch.setattr(prepare, "open_tables", None)
    with pytest.raises(ValueError, match="row 0 of the training rows has no score"):
        prepared(score_field="score")


def test_rows_that_changed_since_the_start_are_an_error(prepared, columns):
    prepared()
    columns["test"] = TEST | {"keys": ["other"]}
    with pytest.raises(ValueError, match=r"was trained on other data: .* other rows for test \("):
        prepared()


def test_the_tokenizer_of_the_start_is_kept(prepared, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(train_tokenizer(["aaa"], vocabulary_size=100).to_str())
    before = tokenizer_of(prepared(tokenizer=str(path)), tmp_path).to_str()
    path.write_text(train_tokenizer(["zzz"], vocabulary_size=100).to_str())
    assert tokenizer_of(prepared(tokenizer=str(path)), tmp_path).to_str() == before


def test_a_vocabulary_must_hold_every_id_of_the_tokenizer(prepared, tmp_path):
    num_ids = tokenizer_of(prepared(), tmp_path).get_vocab_size()
    prepared(vocabulary_size=num_ids)
    with pytest.raises(ValueError, match=f"ids go up to {num_ids - 1}, .*at least {num_ids}$"):
        prepared(vocabulary_size=num_ids - 1)


def test_code_pairs_are_collected_again_only_if_they_are_missing(prepared, tmp_path, monkeypatch):
    made = []

    def prepare_code_pairs(data_dir, **_):
        made.append(tmp_path / f"pairs-{len(made)}")
        made[-1].mkdir()
        return SimpleNamespace(directory=made[-1])

    monkeypatch.setattr(prepare, "prepare_code_pairs", prepare_code_pairs)
    for _ in range(2):
        prepared(name="code_pairs")
    assert len(made) == 1
    made[0].rmdir()
    prepared(name="code_pairs")
    assert len(made) == 2
