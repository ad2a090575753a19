"""Text negatives of rows: batches, labels, the cached folder, and settings."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxcl.data.loader import training_batches
from jaxcl.data.prepare import prepare_data
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.splits import ConcatenatedPairs
from jaxcl.data.text_negatives import TextNegatives, open_text_negatives
from jaxcl.ops.mesh import make_mesh
from jaxcl.settings.read import read_settings

QUERIES = ["red ant", "blue bee", "green cow", "blue bee", "white dog"]
KEYS = ["an ant", "a bee", "a cow", "the bee", "a dog"]
GROUPS = [4, 0, 1, 0, 9]
NEGATIVES = [
    ["a cow", "an owl"],
    [],
    ["green cow", "an ant", "an elk"],
    ["a bee"],
    ["an owl", "a dog", "an elk", "a dog"],
]
SCORES = [[3.0, 1.0, 2.0], [5.0], [4.0, 1.0, 0.5, 1.0], [1.5, 2.5], [9.0, 8.0, 7.0, 6.0, 5.0]]
DISTINCT = ["a cow", "an owl", "green cow", "an ant", "an elk", "a bee", "a dog"]


def pairs(negatives=NEGATIVES, scores=None, groups=GROUPS):
    metadata = {} if negatives is None else {"negatives": negatives}
    metadata |= {} if scores is None else {"teacher_scores": scores}
    return InMemoryPairs(QUERIES, KEYS, groups=groups, metadata=metadata)


@pytest.fixture
def opened(tmp_path):
    """A function from a source and settings to the data of a new run; runs share a data_dir."""
    number = itertools.count()

    def run_data(source, *, scored=False, **data):
        settings = {
            "name": "none",
            "vocabulary_size": 80,
            "max_tokens": {"query": 4, "key": 6},
            "splits": {"train": "train"},
            "prompts": {"key": "the "},
            **data,
        }
        workdir = tmp_path / f"run {next(number)}"
        workdir.mkdir()
        return prepare_data(
            read_settings({"data": settings}).data,
            data_dir=tmp_path / "data",
            workdir=workdir,
            scored=scored,
            open_source=source and (lambda role: source),
        )

    return run_data


def texts_of(data, columns):
    """The texts of a batch's negatives by row, found by their tokens."""
    tokens = data.readers["key"](DISTINCT)["tokens"]
    known = {row.tobytes(): text for row, text in zip(tokens, DISTINCT, strict=True)}
    explicit = columns["negatives"]
    return [
        [known[tokens.tobytes()] for tokens in row[valid]]
        for row, valid in zip(explicit["inputs"]["tokens"], explicit["valid"], strict=True)
    ]


def test_a_batch_holds_the_negatives_of_its_rows(opened):
    data = opened(pairs())
    rows = np.array([4, 1, 0, 2])
    columns = data.negatives.columns(data.tables["train"], rows)
    assert texts_of(data, columns) == [NEGATIVES[row] for row in rows]
    explicit = columns["negatives"]
    assert explicit["valid"].sum(1).tolist() == [4, 0, 2, 3]
    assert explicit["inputs"]["tokens"].shape == (4, 4, 6)
    assert "teacher_scores" not in columns
    numbers = explicit["row"][explicit["valid"]] - len(QUERIES)
    assert [DISTINCT[number] for number in numbers] == [
        text for row in rows for text in NEGATIVES[row]
    ]
    assert {explicit[name].dtype for name in ("row", "text", "group")} == {np.dtype(np.int32)}


def test_negatives_have_the_prompt_and_the_width_of_keys(opened):
    data = opened(pairs())
    inputs = data.negatives.columns(data.tables["train"], np.array([0]))["negatives"]["inputs"]
    first = data.tables["train"].side("key", np.array([2]))["tokens"][0]  # "a cow" is row 2's key
    assert inputs["tokens"][0, 0].tolist() == first.tolist()


def test_a_negative_has_the_labels_of_the_row_whose_key_or_query_it_is(opened):
    data = opened(pairs())
    table = data.tables["train"]
    of_row = table.labels(np.arange(5))
    assert of_row["text"][1] == of_row["text"][3]  # equal queries
    labels = {
        name: dict(zip(DISTINCT, column.tolist(), strict=True))
        for name, column in data.negatives.labels.items()
    }
    for text, row in {"a cow": 2, "green cow": 2, "an ant": 0, "a bee": 1, "a dog": 4}.items():
        assert labels["text"][text] == of_row["text"][row], text
        assert labels["group"][text] == of_row["group"][row], text
    fresh = [labels["text"][text] for text in ("an owl", "an elk")]
    assert len({*fresh, *of_row["text"].tolist()}) == 2 + len(set(of_row["text"].tolist()))
    nobodys = {labels["group"][text] for text in ("an owl", "an elk")}
    assert nobodys == {2}  # the smallest number that is not a group
    assert data.negatives.num_own == 4  # "green cow" is a query, "a bee" row 3's, "a dog" twice


def test_groups_at_the_end_of_int32_leave_a_number(opened):
    data = opened(pairs(groups=[2**31 - 1, 0, 1, 0, -(2**31)]))
    assert data.negatives.labels["group"][DISTINCT.index("an owl")] == 2


def test_texts_that_tokenise_alike_share_a_label(opened):
    # The texts differ after the limit of 6 tokens.
    cut = "a cow and a very long tail of other words that no limit leaves"
    data = opened(pairs([[f"{cut} one", f"{cut} two"], [], [], [], []]))
    assert data.negatives.texts.num_rows == 2
    first, second = data.negatives.labels["text"].tolist()
    assert first == second
    assert first not in data.tables["train"].text.tolist()


def test_a_negative_that_tokenises_like_a_key_has_its_labels(opened):
    long = "a cow and a very long tail of other words that no limit leaves"
    source = InMemoryPairs(
        QUERIES,
        [f"{long} {row}" if row == 3 else KEYS[row] for row in range(5)],
        groups=GROUPS,
        metadata={"negatives": [[], [f"{long} again"], [], [], []]},
    )
    data = opened(source)
    assert data.negatives.labels["text"].tolist() == [data.tables["train"].text[3]]
    assert data.negatives.num_own == 1  # rows 1 and 3 have equal queries


@pytest.mark.parametrize(("given", "wanted"), [(1, 1), (3, 3), (4, 4), (9, 4), (None, 4)])
def test_the_first_negatives_of_each_list_are_taken(opened, given, wanted):
    data = opened(pairs(scores=SCORES), scored=True, negatives_per_row=given)
    assert data.negatives.per_row == wanted
    columns = data.negatives.columns(data.tables["train"], np.arange(5))
    assert texts_of(data, columns) == [texts[:wanted] for texts in NEGATIVES]
    padded = [(one[: 1 + wanted] + [0.0] * wanted)[: 1 + wanted] for one in SCORES]
    assert columns["teacher_scores"].tolist() == padded
    assert columns["teacher_scores"].dtype == np.float32


def test_zero_negatives_per_row_leave_them_out(opened):
    assert opened(pairs(), negatives_per_row=0).negatives is None


def test_rows_without_negatives_need_no_setting(opened):
    assert opened(pairs(None)).negatives is None
    assert opened(pairs([[], [], None, [], []])).negatives is None


@pytest.mark.parametrize("negatives", [None, [[]] * 5])
def test_a_number_per_row_without_negatives_is_an_error(opened, negatives):
    for given in (2, 2):  # also once the folder is cached
        with pytest.raises(ValueError, match=r"negatives_per_row=2, but the training rows have no"):
            opened(pairs(negatives), negatives_per_row=given)


def test_negatives_of_a_file_and_of_rows_are_an_error(opened, tmp_path):
    np.savez(tmp_path / "negatives.npz", rows=np.zeros((5, 1), int))
    file = {"negatives": str(tmp_path / "negatives.npz")}
    with pytest.raises(ValueError, match=r"set data\.negatives to None, or data\.neg"):
        opened(pairs(), **file)
    found = opened(pairs(), **file, negatives_per_row=0).negatives
    assert not isinstance(found, TextNegatives)
    with pytest.raises(ValueError, match=r"negatives_per_row=2 counts texts that rows bring, and"):
        read_settings({"data": {**file, "negatives_per_row": 2}})


def test_scores_are_read_only_if_the_loss_needs_them(opened):
    assert opened(pairs(scores=SCORES)).negatives.scores is None
    with pytest.raises(ValueError, match=r"row 0 of the training rows has no teacher_scores"):
        opened(pairs(), scored=True)
    some = [*SCORES[:3], None, SCORES[4]]
    assert opened(pairs(scores=some)).negatives.scores is None
    with pytest.raises(ValueError, match=r"row 3 of the training rows has no teacher_scores"):
        opened(pairs(scores=some), scored=True)


def test_a_wrong_row_stops_the_run(opened):
    with pytest.raises(ValueError, match="negative 0 of row 3 is an empty text"):
        opened(pairs([*NEGATIVES[:3], [""], []]))


def test_the_lists_are_read_once(opened, tmp_path, capsys):
    first = opened(pairs()).negatives
    assert "reading negatives" in capsys.readouterr().err
    again = opened(pairs()).negatives
    assert "reading negatives" not in capsys.readouterr().err
    other = opened(pairs(), max_tokens={"query": 4, "key": 5}).negatives
    assert "reading negatives" in capsys.readouterr().err
    assert again.numbers.tolist() == first.numbers.tolist()
    assert other.labels["text"].tolist() == first.labels["text"].tolist()
    folders = list((tmp_path / "data" / "negatives").iterdir())
    assert len(folders) == 2
    for folder in folders:
        path = folder / "numbers.npy"
        path.write_bytes(path.read_bytes()[:-1])
    mended = opened(pairs()).negatives
    assert "the rows' negatives are computed again" in capsys.readouterr().err
    assert mended.numbers.tolist() == first.numbers.tolist()


def test_labels_are_computed_again_if_those_of_the_rows_change(opened, tmp_path):
    data = opened(pairs())
    table = data.tables["train"]
    settings = read_settings({"data": {"name": "none"}}).data
    folders = {"data_dir": tmp_path / "data", "workdir": tmp_path / "run 0"}
    shifted = table._replace(text=table.text + 100, group=table.group + 3)
    for one, text, group in ((table, 0, 0), (shifted, 100, 3), (table, 0, 0)):
        labels = open_text_negatives(settings, data.sources["train"], one, **folders).labels
        assert labels["text"][0] == table.text[2] + text
        assert labels["group"][0] == table.group[2] + group


def test_concatenated_data_sets_may_have_negatives_or_none(opened):
    source = ConcatenatedPairs([pairs(None), pairs()])
    data = opened(source)
    assert data.negatives.counts.tolist() == [0] * 5 + [len(texts) for texts in NEGATIVES]
    columns = data.negatives.columns(data.tables["train"], np.array([1, 7]))
    assert texts_of(data, columns) == [[], NEGATIVES[2]]


def test_negatives_have_the_prompt_of_their_data_set(opened, tmp_path):
    records = [
        {"query": query, "key": key, "negatives": negatives}
        for query, key, negatives in zip(QUERIES, KEYS, NEGATIVES, strict=True)
    ]
    for name in ("first", "wiki"):
        lines = [json.dumps(record) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    wiki = {"name": str(tmp_path / "wiki.jsonl"), "splits": {"train": "train"}}
    data = opened(
        None,
        name=str(tmp_path / "first.jsonl"),
        concatenated={"wiki": wiki | {"prompts": {"key": "wiki "}}},
        max_tokens={"query": 4, "key": 12},
    )
    table, negatives = data.tables["train"], data.negatives
    assert negatives.texts.num_rows == 2 * len(DISTINCT)
    assert negatives.counts.tolist() == [len(texts) for texts in NEGATIVES] * 2
    cow = negatives.columns(table, np.array([0, 5]))["negatives"]
    keys = table.side("key", np.array([2, 7]))["tokens"]  # "a cow", with either prompt
    assert keys[0].tolist() != keys[1].tolist()
    assert cow["inputs"]["tokens"][:, 0].tolist() == keys.tolist()
    assert table.text[2] == table.text[7]
    assert cow["text"][:, 0].tolist() == [table.text[2]] * 2
    # "an owl" is not a key: it has one label per data set, and no row has either.
    assert not set(cow["text"][:, 1].tolist()) & set(table.text.tolist())


def test_the_loader_reads_them_with_each_batch(opened):
    data = opened(pairs(scores=SCORES), scored=True)
    table = data.tables["train"]
    rows = np.array([3, 0, 4, 1])
    how = {"first_step": 0, "last_step": 1, "negatives": data.negatives}
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    [batch] = training_batches(table, lambda step: rows, mesh, **how)
    assert texts_of(data, jax.device_get(batch)) == [NEGATIVES[row] for row in rows]
    assert batch["teacher_scores"][0].tolist() == [1.5, 2.5, 0, 0, 0]
