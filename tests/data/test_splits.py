"""Several data sets as one: rows end to end, groups of their own, errors that name the setting."""

import pickle

import numpy as np
import pytest

from configs.code_search import get_config
from jaxcl.data import splits
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.splits import JoinedPairs, open_splits, part_names
from jaxcl.data.token_table import build_token_table
from jaxcl.data.tokenizer import train_tokenizer

CODE = InMemoryPairs(["q0", "q1"], ["k0", "k1"], groups=[7, -3])
WIKI = InMemoryPairs(["q2", "q1", "q4"], ["k2", "k3", "k4"], groups=[7, 7, 2**31 - 1])
HELD_OUT = InMemoryPairs(["q5"], ["k5"])
DATA_SETS = {
    ("code", "train"): CODE,
    ("wiki:1.0.0", "train"): WIKI,
    ("code", "validation"): HELD_OUT,
    ("wiki:1.0.0", "test[:1]"): InMemoryPairs(["q6"], ["k6"]),
}


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Opens the splits by what is joined; also what each data set was asked for."""
    asked = {}

    def open_pairs(name, split, *, data_dir, **options):
        assert data_dir == tmp_path
        asked[name] = options
        return DATA_SETS[name, split]

    monkeypatch.setattr(splits, "open_pairs", open_pairs)

    def open_with(**joined):
        config = get_config("smoke").data
        with config.unlocked():
            config.splits = type(config)({"train": "train", "validation": "validation"})
            config.joined = type(config)(joined)
        config.metadata_fields = ("name",)
        return open_splits(config, "code", data_dir=tmp_path), asked, part_names(config)

    return open_with


WIKI_TRAINS = {"name": "wiki:1.0.0", "splits": {"train": "train"}, "query_field": "question"}


def test_rows_of_joined_data_sets_follow_each_other(opened):
    sources, asked, parts = opened(wiki=WIKI_TRAINS)
    train = sources["train"]
    assert len(train) == 5
    rows = [4, 0, 2, 1, 3, 4]
    assert [record["query"] for record in train.read(rows)] == ["q4", "q0", "q2", "q1", "q1", "q4"]
    assert train.part.tolist() == [0, 0, 1, 1, 1]
    assert parts == ("first", "wiki")
    assert sources["validation"] is HELD_OUT
    assert asked["wiki:1.0.0"] == {
        "query_field": "question",
        "key_field": "key",
        "group_field": None,
        "metadata_fields": (),
    }
    assert train.read([]) == []
    with pytest.raises(IndexError, match="there are 5"):
        train.read([5])


def test_nothing_joined_is_the_data_set_itself(opened):
    sources, _, parts = opened()
    assert sources == {"train": CODE, "validation": HELD_OUT}
    assert parts == ("first",)


def test_held_out_rows_may_join_too(opened):
    roles = {"train": "train", "validation": "test[:1]"}
    sources, *_ = opened(wiki=WIKI_TRAINS | {"splits": roles, "metadata_fields": ("name",)})
    assert [record["query"] for record in sources["validation"].read([1, 0])] == ["q6", "q5"]


def test_a_fingerprint_names_the_parts_in_order():
    joined, other = JoinedPairs([CODE, WIKI]), JoinedPairs([WIKI, CODE])
    assert joined.fingerprint == JoinedPairs([CODE, WIKI]).fingerprint
    assert len({joined.fingerprint, other.fingerprint, CODE.fingerprint}) == 3
    assert pickle.loads(pickle.dumps(joined)).read([3]) == joined.read([3])


def test_groups_of_different_data_sets_differ_and_equal_texts_are_found_in_all(tmp_path):
    table = build_token_table(
        JoinedPairs([CODE, WIKI]),
        train_tokenizer(["q0 q1 q2 q4 k0 k1 k2 k3 k4"], vocabulary_size=300),
        max_tokens={"query": 4, "key": 4},
        directory=tmp_path,
    )
    # By data set, then by number: -3 and 7 of the first, 7 and the greatest of the second.
    assert table.group.tolist() == [1, 0, 2, 2, 3]
    assert table.group.dtype == np.int32
    text = table.text
    assert text[1] == text[3]  # q1
    assert len(set(text.tolist())) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, r"data\.joined\.wiki needs a name"),
        ({"splits": {}}, r"data\.joined\.wiki needs a name, .*, and splits"),
        ({"split": "train"}, r"data\.joined\.wiki has \['split'\]; it takes"),
        ({"splits": {"test": "train"}}, "has 'test'; data.splits has train, validation"),
        ({"splits": {"validation": "test[:1]"}}, r"metadata_fields lacks \['name'\]"),
    ],
)
def test_what_cannot_join_says_why(opened, changes, message):
    with pytest.raises(ValueError, match=message):
        opened(wiki=WIKI_TRAINS | changes)
