"""Several data sets as one: rows end to end, separate groups, errors that name the setting."""

import pickle

import numpy as np
import pytest
from jaxcl.configs.code_search import get_config

from jaxcl.data import splits
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.splits import ConcatenatedPairs, open_splits
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import build_token_table
from jaxcl.data.tokenizer import train_tokenizer
from jaxcl.settings.derived import data_set_names
from jaxcl.settings.read import read_settings

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
    """A function that opens the splits with further data sets; it also returns their options."""
    asked = {}

    def open_pairs(name, split, *, data_dir, **options):
        assert data_dir == tmp_path
        asked[name] = options
        if options["query_field"] == "nosuch":
            raise ValueError("wiki has no field 'nosuch'")
        return DATA_SETS[name, split]

    monkeypatch.setattr(splits, "open_pairs", open_pairs)

    def open_with(**others):
        config = get_config("smoke").data
        with config.unlocked():
            config.splits = type(config)({"train": "train", "validation": "validation"})
            config.concatenated = type(config)(others)
        config.metadata_fields = ("name",)
        data = read_settings({"data": config.to_dict()}).data
        return open_splits(data, "code", data_dir=tmp_path), asked, data_set_names(data)

    return open_with


WIKI_TRAINS = {
    "name": "wiki:1.0.0",
    "splits": {"train": "train"},
    "query_field": "question",
    "key_field": "answer",
    "group_field": "topic",
}
HELD_OUT_TOO = {
    "name": "wiki:1.0.0",
    "splits": {"validation": "test[:1]"},
    "group_field": "topic",
    "metadata_fields": ("name",),
}


def test_rows_of_another_data_set_follow(opened):
    sources, asked, names = opened(wiki=WIKI_TRAINS)
    train = sources["train"]
    assert len(train) == 5
    rows = [4, 0, 2, 1, 3, 4]
    assert [record["query"] for record in train.read(rows)] == ["q4", "q0", "q2", "q1", "q1", "q4"]
    assert train.data_set_of_row.tolist() == [0, 0, 1, 1, 1]
    assert names == ("first", "wiki")
    assert sources["validation"] is HELD_OUT
    assert asked["wiki:1.0.0"] == {
        "query_field": "question",
        "key_field": "answer",
        "group_field": "topic",
        "score_field": None,
        "metadata_fields": (),
        "text_sides": ["query", "key"],
        "image_sides": [],
    }
    assert train.read([]) == []
    with pytest.raises(IndexError, match="there are 5"):
        train.read([5])


def test_a_single_data_set_is_not_wrapped(opened):
    sources, _, names = opened()
    assert sources == {"train": CODE, "validation": HELD_OUT}
    assert names == ("first",)


class NoRows(InMemoryPairs):
    """A user's source that has lost its rows."""

    def __len__(self):
        return 0


def test_a_source_without_rows_is_an_error_that_names_the_split(tmp_path):
    data = read_settings({"data": get_config("smoke").data.to_dict()}).data
    with pytest.raises(ValueError, match=r"data\.splits\.\w+='.*' has no rows"):
        open_splits(data, "x", data_dir=tmp_path, open_source=lambda role: NoRows(["a"], ["b"]))


def test_several_follow_by_name_each_in_the_splits_that_it_gives(opened):
    sources, _, names = opened(b=WIKI_TRAINS, a=HELD_OUT_TOO, c=WIKI_TRAINS)
    assert names == ("first", "b", "c")
    assert sources["train"].data_set_of_row.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [record["query"] for record in sources["validation"].read([1, 0])] == ["q6", "q5"]
    _, asked, _ = opened(a=HELD_OUT_TOO)
    assert asked["wiki:1.0.0"]["key_field"] == "key"


def test_a_fingerprint_names_all_data_sets_in_order():
    wanted = ConcatenatedPairs([CODE, WIKI]).fingerprint
    assert wanted == ConcatenatedPairs([CODE, WIKI]).fingerprint
    others = [CODE, *(ConcatenatedPairs(two) for two in ([WIKI, CODE], [CODE, HELD_OUT]))]
    assert len({wanted, *(other.fingerprint for other in others)}) == 4
    pickled = pickle.loads(pickle.dumps(ConcatenatedPairs([CODE, WIKI])))
    assert pickled.read([3]) == WIKI.read([1])


def test_groups_of_different_data_sets_differ_and_equal_texts_are_found_in_all(tmp_path):
    table = build_token_table(
        ConcatenatedPairs([CODE, WIKI, CODE]),
        train_tokenizer(["q0 q1 q2 q4 k0 k1 k2 k3 k4"], vocabulary_size=300),
        rules=dict.fromkeys(("query", "key"), TextRule(4)),
        directory=tmp_path,
    )
    # The first data set's groups stay; 8 to 11 are the groups of the second and the third.
    assert table.group.tolist() == [7, -3, 8, 8, 9, 11, 10]
    assert table.group.dtype == np.int32
    text = table.text
    assert text[1] == text[3] == text[6]  # q1
    assert len(set(text.tolist())) == 4


def test_groups_that_cannot_be_distinguished_are_an_error():
    pairs = ConcatenatedPairs([WIKI, CODE])
    with pytest.raises(ValueError, match=r"go up to 2147483649, .*give the first smaller numbers"):
        pairs.distinct_groups(np.array([7, 7, 2**31 - 1, 7, -3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, r"data\.concatenated\.wiki needs a name"),
        ({"name": "code_pairs"}, "is made for data.name alone; give the folder"),
        ({"splits": {}}, r"data\.concatenated\.wiki needs a name, .*, and splits"),
        ({"splits": "train"}, r"wiki\.splits='train'; set it to a mapping"),
        ({"split": "train"}, r"wiki\.split is unknown \(did you mean 'splits'\?\)"),
        ({"splits": {"test": "train"}}, "has 'test'; data.splits has train, validation"),
        ({"splits": {"validation": "test[:1]"}}, r"metadata_fields lacks \['name'\]"),
        ({"group_field": None}, r"group_field=None, but data\.group_field='group'"),
        ({"query_field": "nosuch"}, r"data\.concatenated\.wiki: wiki has no field 'nosuch'"),
    ],
)
def test_a_data_set_that_cannot_be_concatenated_is_an_error_with_the_reason(
    opened, changes, message
):
    with pytest.raises(ValueError, match=message):
        opened(wiki=WIKI_TRAINS | changes)


def test_invalid_names_and_forms_are_named(opened):
    with pytest.raises(ValueError, match=r"'first' is what data\.name is called"):
        opened(first=WIKI_TRAINS)
    with pytest.raises(ValueError, match="wiki='/folder'; set it to a ConfigDict with name"):
        opened(wiki="/folder")
