"""Token tables: what encoding each text gives, made once, whole or not there."""

import os

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxcl.data import token_table
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.table import table_batch
from jaxcl.data.token_table import build_token_table, padded
from jaxcl.data.tokenizer import encode_texts, train_tokenizer

NUM_ROWS = 11
MAX_TOKENS = {"query": 4, "key": 7}
QUERIES = [" ".join(["add", "one", "to", "the", "number"][: i % 6]) for i in range(NUM_ROWS)]
KEYS = [" ".join(f"return x{i} + 1".split()[: 1 + i % 5]) * (1 + i % 2) for i in range(NUM_ROWS)]
GROUPS = [i // 3 for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*QUERIES, *KEYS], vocabulary_size=80)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three chunks, the last of them short."""
    monkeypatch.setattr(token_table, "_CHUNK_ROWS", 4)


class CountingPairs(InMemoryPairs):
    """Pairs that count the rows read, and fail at one of them."""

    def __init__(self, *args, fails_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows_read, self.fails_at = 0, fails_at

    def read(self, rows):
        if self.fails_at in list(rows):
            raise KeyboardInterrupt
        self.rows_read += len(rows)
        return super().read(rows)


def pairs(**options):
    return CountingPairs(QUERIES, KEYS, groups=GROUPS, **options)


def build(source, tokenizer, directory, *, max_tokens=MAX_TOKENS, add_cls=False, **options):
    return build_token_table(
        source, tokenizer, max_tokens=max_tokens, add_cls=add_cls, directory=directory, **options
    )


def directly(tokenizer, texts, *, width, add_cls=False):
    """Each text by itself, with zeros behind."""
    rows = encode_texts(tokenizer, texts, max_tokens=width, add_cls=add_cls)
    return np.array([[*row, *[0] * (width - len(row))] for row in rows])


@pytest.mark.parametrize("add_cls", [False, True])
def test_the_table_holds_what_encoding_each_text_gives(tokenizer, tmp_path, add_cls):
    table = build(pairs(), tokenizer, tmp_path, add_cls=add_cls)
    batch = table_batch(table, np.arange(NUM_ROWS))
    for side, texts in (("query", QUERIES), ("key", KEYS)):
        wanted = directly(tokenizer, texts, width=MAX_TOKENS[side], add_cls=add_cls)
        np.testing.assert_array_equal(batch[side]["tokens"], wanted)
        assert batch[side]["tokens"].dtype == np.int32
        assert len(np.unique(wanted, axis=0)) > 3  # the rows can be told apart


@pytest.mark.parametrize("chunk_rows", [1, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1])
def test_the_size_of_the_chunks_does_not_matter(tokenizer, tmp_path, chunk_rows, monkeypatch):
    monkeypatch.setattr(token_table, "_CHUNK_ROWS", chunk_rows)
    tokens = build(pairs(), tokenizer, tmp_path).side("key", np.arange(NUM_ROWS))["tokens"]
    np.testing.assert_array_equal(tokens, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))


@pytest.mark.parametrize("rows", [[0], [10], [7, 2, 10, 2, 2, 0], list(range(10, -1, -1)) * 2])
def test_rows_come_in_the_order_asked_for_and_as_often(tokenizer, tmp_path, rows):
    table = build(pairs(), tokenizer, tmp_path)
    batch, whole = table_batch(table, np.array(rows)), table_batch(table, np.arange(NUM_ROWS))
    for side in ("query", "key"):
        np.testing.assert_array_equal(batch[side]["tokens"], whole[side]["tokens"][rows])
    np.testing.assert_array_equal(batch["row"], rows)
    np.testing.assert_array_equal(batch["group"], np.array(GROUPS)[rows])
    assert batch["row"].dtype == batch["group"].dtype == np.int32


def test_one_row_is_a_table(tokenizer, tmp_path):
    table = build(InMemoryPairs([""], ["return"]), tokenizer, tmp_path)
    assert table.num_rows == 1
    unknown = tokenizer.token_to_id("[UNK]")
    query = table_batch(table, np.array([0]))["query"]["tokens"]
    np.testing.assert_array_equal(query, [[unknown, 0, 0, 0]])


def test_padding_stands_behind_the_tokens_and_nowhere_else():
    flat = np.array([5, 6, 7, 8, 9])
    starts, lengths = np.array([2, 0, 4]), np.array([2, 0, 1])
    found = padded(flat, starts, lengths, width=3)
    np.testing.assert_array_equal(found, [[7, 8, 0], [0, 0, 0], [9, 0, 0]])


def test_a_table_is_built_once(tokenizer, tmp_path):
    source = pairs()
    first = build(source, tokenizer, tmp_path)
    assert source.rows_read == NUM_ROWS
    done = []
    second = build(source, tokenizer, tmp_path, advance=done.append)
    assert source.rows_read == NUM_ROWS
    assert done == []
    rows = np.arange(NUM_ROWS)
    np.testing.assert_array_equal(
        table_batch(first, rows)["key"]["tokens"], table_batch(second, rows)["key"]["tokens"]
    )


def test_advance_counts_every_row_once(tokenizer, tmp_path):
    done = []
    build(pairs(), tokenizer, tmp_path, advance=done.append)
    assert done == [4, 4, 3]


def test_whatever_it_was_made_from_a_table_has_a_place_of_its_own(tokenizer, tmp_path):
    other = train_tokenizer(KEYS, vocabulary_size=40)
    build(pairs(), tokenizer, tmp_path)
    build(pairs(), other, tmp_path)
    build(pairs(), tokenizer, tmp_path, max_tokens={"query": 4, "key": 6})
    build(pairs(), tokenizer, tmp_path, max_tokens={"query": 7, "key": 4})
    build(pairs(), tokenizer, tmp_path, add_cls=True)
    build(InMemoryPairs(QUERIES, KEYS, groups=GROUPS[::-1]), tokenizer, tmp_path)
    build(InMemoryPairs(KEYS, QUERIES, groups=GROUPS), tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7


def test_an_equal_source_shares_the_table(tokenizer, tmp_path):
    build(pairs(), tokenizer, tmp_path)
    twin = pairs()
    build(twin, tokenizer, tmp_path)
    assert twin.rows_read == 0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fails_at", [0, 5, NUM_ROWS - 1])
def test_a_table_cut_off_while_written_is_not_taken_for_one(tokenizer, tmp_path, fails_at):
    with pytest.raises(KeyboardInterrupt):
        build(pairs(fails_at=fails_at), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    source = pairs()
    table = build(source, tokenizer, tmp_path)
    assert source.rows_read == NUM_ROWS
    assert table.num_rows == NUM_ROWS


def test_a_process_killed_while_writing_leaves_nothing_that_is_taken_for_a_table(
    tokenizer, tmp_path, monkeypatch
):
    with monkeypatch.context() as killed:
        killed.setattr(token_table.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            build(pairs(fails_at=NUM_ROWS - 1), tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # what a killed process cannot tidy up
    source = pairs()
    rows = np.arange(NUM_ROWS)
    tokens = build(source, tokenizer, tmp_path).side("key", rows)["tokens"]
    assert source.rows_read == NUM_ROWS
    np.testing.assert_array_equal(tokens, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))


def test_two_processes_that_finish_together_share_one_table(tokenizer, tmp_path, monkeypatch):
    rename = os.rename

    def rename_after_another(unfinished, path):
        monkeypatch.setattr(token_table.os, "rename", rename)
        build(pairs(), tokenizer, tmp_path)
        rename(unfinished, path)

    monkeypatch.setattr(token_table.os, "rename", rename_after_another)
    assert build(pairs(), tokenizer, tmp_path).num_rows == NUM_ROWS
    assert len(list(tmp_path.iterdir())) == 1


def word_level(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("vocabulary_size", "dtype"), [(100, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocabulary_size, dtype):
    tokenizer = word_level({f"w{i}": i for i in range(2, vocabulary_size)})
    last = f"w{vocabulary_size - 1}"
    table = build(InMemoryPairs([last], [f"w2 {last}"]), tokenizer, tmp_path)
    assert table.tokens["query"].dtype == dtype
    keys = table_batch(table, np.array([0]))["key"]["tokens"]
    np.testing.assert_array_equal(keys, [[2, vocabulary_size - 1, 0, 0, 0, 0, 0]])
    assert keys.dtype == np.int32


def test_ids_with_gaps_between_them_are_kept_whole(tmp_path):
    """A foreign vocabulary may be small and still number a token beyond 2¹⁶."""
    table = build(InMemoryPairs(["far"], ["far"]), word_level({"far": 2**16 + 5}), tmp_path)
    assert table_batch(table, np.array([0]))["query"]["tokens"][0, 0] == 2**16 + 5


def test_a_source_without_groups_has_group_0_throughout(tokenizer, tmp_path):
    table = build(InMemoryPairs(QUERIES, KEYS), tokenizer, tmp_path)
    assert table_batch(table, np.arange(NUM_ROWS))["group"].tolist() == [0] * NUM_ROWS


def test_tokens_stay_on_disk(tokenizer, tmp_path):
    table = build(pairs(), tokenizer, tmp_path)
    for side in ("query", "key"):
        assert isinstance(table.tokens[side], np.memmap)
        assert not table.tokens[side].flags.writeable


def test_rows_of_equal_queries_or_keys_are_of_one_text(tokenizer, tmp_path):
    queries = ["add one", "add two", "add one", "sub", "mul", "sub"]
    keys = ["return a", "return b", "return c", "return c", "return d", "return e f"]
    pairs = InMemoryPairs(queries, keys)
    table = build_token_table(pairs, tokenizer, max_tokens=MAX_TOKENS, directory=tmp_path)
    # 0 and 2 share a query, 2 and 3 a key, 3 and 5 a query.
    assert table.text[[0, 2, 3, 5]].tolist() == [table.text[0]] * 4
    assert len(set(table.text.tolist())) == 3
    assert table_batch(table, np.array([4, 1]))["text"].tolist() == table.text[[4, 1]].tolist()


def test_texts_that_agree_as_far_as_they_are_read_are_one(tokenizer, tmp_path):
    same = "return x1 + 1 and then some more of it"
    pairs = InMemoryPairs(["a", "b"], [f"{same} {end}" for end in ("here", "there")])
    table = build_token_table(pairs, tokenizer, max_tokens=MAX_TOKENS, directory=tmp_path)
    assert len(set(table.text.tolist())) == 1
