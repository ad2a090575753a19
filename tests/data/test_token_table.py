"""Token tables hold the tokens of each text, are built once, and are complete or absent."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxcl.data import checked_array, column_folder, token_columns, token_table
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.table import table_batch
from jaxcl.data.text_rule import TextRule, TextTokenizer
from jaxcl.data.token_table import build_token_table
from jaxcl.data.tokenizer import tokenizer_fingerprint, train_tokenizer
from jaxcl.host.files import read_sealed_json, write_sealed_json
from tests.data.test_text_rule import word_tokenizer

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
    """Three chunks, with a short last one."""
    monkeypatch.setattr(token_columns, "_CHUNK_ROWS", 4)


class CountingPairs(InMemoryPairs):
    """Pairs that record the number of rows read, and fail at a given row."""

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


def build(source, tokenizer, directory, *, max_tokens=MAX_TOKENS, advance=None, **rule):
    rules = {side: TextRule(width, **rule) for side, width in max_tokens.items()}
    options = {} if advance is None else {"advance": advance}
    return build_token_table(source, tokenizer, rules=rules, directory=directory, **options)


def directly(tokenizer, texts, *, width, add_cls=False):
    """The tokens of each text on its own, padded with zeros."""
    text = TextTokenizer(tokenizer, TextRule(width, add_cls=add_cls))
    rows = [row for each in texts for row in text.tokenize([each])]
    return np.array([[*row, *[0] * (width - len(row))] for row in rows])


@pytest.mark.parametrize("add_cls", [False, True])
def test_the_table_has_the_tokens_of_each_text(tokenizer, tmp_path, add_cls):
    table = build(pairs(), tokenizer, tmp_path, add_cls=add_cls)
    batch = table_batch(table, np.arange(NUM_ROWS))
    for side, texts in (("query", QUERIES), ("key", KEYS)):
        wanted = directly(tokenizer, texts, width=MAX_TOKENS[side], add_cls=add_cls)
        np.testing.assert_array_equal(batch[side]["tokens"], wanted)
        assert batch[side]["tokens"].dtype == np.int32
        assert len(np.unique(wanted, axis=0)) > 3  # the rows differ


@pytest.mark.parametrize("chunk_rows", [1, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1])
def test_the_size_of_the_chunks_does_not_matter(tokenizer, tmp_path, chunk_rows, monkeypatch):
    monkeypatch.setattr(token_columns, "_CHUNK_ROWS", chunk_rows)
    tokens = build(pairs(), tokenizer, tmp_path).side("key", np.arange(NUM_ROWS))["tokens"]
    np.testing.assert_array_equal(tokens, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))


@pytest.mark.parametrize("rows", [[0], [10], [7, 2, 10, 2, 2, 0], list(range(10, -1, -1)) * 2])
def test_rows_have_the_requested_order_and_repeats(tokenizer, tmp_path, rows):
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


def test_tables_of_different_inputs_have_different_folders(tokenizer, tmp_path):
    other = train_tokenizer(KEYS, vocabulary_size=40)
    build(pairs(), tokenizer, tmp_path)
    build(pairs(), other, tmp_path)
    build(pairs(), tokenizer, tmp_path, max_tokens={"query": 4, "key": 6})
    build(pairs(), tokenizer, tmp_path, max_tokens={"query": 7, "key": 4})
    build(pairs(), tokenizer, tmp_path, add_cls=True)
    build(InMemoryPairs(QUERIES, KEYS, groups=GROUPS[::-1]), tokenizer, tmp_path)
    build(InMemoryPairs(KEYS, QUERIES, groups=GROUPS), tokenizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7


def test_the_names_of_tables_without_the_newer_rules_do_not_change(tokenizer, tmp_path):
    rules = {"query": TextRule(4, True, True), "key": TextRule(7, True, True)}
    build_token_table(pairs(), tokenizer, rules=rules, directory=tmp_path)
    made_from = {
        "format": 4,
        "source": pairs().fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_tokens": {"query": 4, "key": 7},
        "add_cls": True,
        "distinct": True,
    }
    [table] = tmp_path.iterdir()
    content = json.dumps(made_from, sort_keys=True)
    assert table.name == hashlib.sha256(content.encode()).hexdigest()[:12]


NEWER_RULES = [
    {"special_tokens": True},
    {"special_tokens": False},
    {"prompt": "add: "},
    {"prompt": "add "},
    {"special_tokens": False, "skip_unknown": True},
]


def test_each_rule_has_its_own_table(tokenizer, tmp_path):
    for rule in NEWER_RULES:
        build(pairs(), tokenizer, tmp_path, **rule)
        for side in MAX_TOKENS:
            rules = {name: TextRule(width) for name, width in MAX_TOKENS.items()}
            rules[side] = rules[side]._replace(**rule)
            build_token_table(pairs(), tokenizer, rules=rules, directory=tmp_path)
    one = {"query": TextRule(4, add_cls=True), "key": TextRule(7)}
    build_token_table(pairs(), tokenizer, rules=one, directory=tmp_path)
    build(pairs(), tokenizer, tmp_path, add_cls=True)
    assert len(list(tmp_path.iterdir())) == 3 * len(NEWER_RULES) + 2


def test_an_equal_source_shares_the_table(tokenizer, tmp_path):
    build(pairs(), tokenizer, tmp_path)
    twin = pairs()
    build(twin, tokenizer, tmp_path)
    assert twin.rows_read == 0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fails_at", [0, 5, NUM_ROWS - 1])
def test_a_partially_written_table_is_not_used(tokenizer, tmp_path, fails_at):
    with pytest.raises(KeyboardInterrupt):
        build(pairs(fails_at=fails_at), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    source = pairs()
    table = build(source, tokenizer, tmp_path)
    assert source.rows_read == NUM_ROWS
    assert table.num_rows == NUM_ROWS


KILLED = """
import os, sys
from pathlib import Path
from tokenizers import Tokenizer
from jaxcl.data.sources import InMemoryPairs
from jaxcl.data.text_rule import TextRule
from jaxcl.data.token_table import build_token_table

class Killed(InMemoryPairs):
    def read(self, rows):
        os._exit(9)

tokenizer = Tokenizer.from_file(sys.argv[1])
pairs = Killed(["a"], ["b"])
build_token_table(
    pairs,
    tokenizer,
    rules={"query": TextRule(4), "key": TextRule(7)},
    directory=Path(sys.argv[2]),
)
"""


def test_leftovers_of_a_killed_process_are_removed(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    directory = tmp_path / "tokens"
    arguments = [str(tmp_path / "tokenizer.json"), str(directory)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == 9
    [left] = directory.iterdir()
    source = pairs()
    rows = np.arange(NUM_ROWS)
    tokens = build(source, tokenizer, directory).side("key", rows)["tokens"]
    assert source.rows_read == NUM_ROWS
    np.testing.assert_array_equal(tokens, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))
    assert not left.exists()


def test_the_unfinished_table_of_a_living_process_stays(tokenizer, tmp_path):
    class BuildsAnother(InMemoryPairs):
        def read(self, rows):
            [unfinished] = tmp_path.iterdir()
            build(pairs(), tokenizer, tmp_path)
            assert unfinished.exists()
            return super().read(rows)

    source = BuildsAnother(["add"], ["return"])
    assert build(source, tokenizer, tmp_path).num_rows == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_that_finish_together_share_one_table(tokenizer, tmp_path, monkeypatch):
    put = column_folder.put_in_place

    def put_after_another(*arguments, **options):
        monkeypatch.setattr(column_folder, "put_in_place", put)
        build(pairs(), tokenizer, tmp_path)
        put(*arguments, **options)

    monkeypatch.setattr(column_folder, "put_in_place", put_after_another)
    assert build(pairs(), tokenizer, tmp_path).num_rows == NUM_ROWS
    assert len(list(tmp_path.iterdir())) == 1


def test_others_may_read_a_table(tokenizer, tmp_path):
    before = os.umask(0o022)
    try:
        build(pairs(), tokenizer, tmp_path)
    finally:
        os.umask(before)
    [table] = tmp_path.iterdir()
    assert table.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in table.iterdir()} == {0o644}


class Rows:
    """A user's source, with any values."""

    fingerprint, row_ranges = "rows", ()

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def read(self, rows):
        return [dict(zip(("query", "key", "group"), self.rows[row], strict=True)) for row in rows]


GOOD = [("add", "return", 0)] * 5  # more than a chunk


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("add", "return", 2**31),
            "group has 2147483648 in row 5; use integers in int32",
        ),
        (("add", "return", -(2**40)), "group has .* in row 5; use integers in int32"),
        (("add", "return", 0.5), r"group has 0\.5 in row 5; use integers in int32"),
        (("add", "return", "0"), "group has '?0'? in row 5"),
        (("add", "return", None), "group has None in row 5"),
        (("add", "return", 2**70), "group has 1180591620717411303424 in row 5"),
        ((3, "return", 0), "query of row 5 is int, 3; give a text"),
        (("add", b"return", 0), "key of row 5 is bytes, b'return'; give a text"),
        (("add", None, 0), "key of row 5 is NoneType, None; give a text"),
        (("add", ["return"], 0), r"key of row 5 is list, \['return'\]; give a text"),
        (("add", np.zeros(2), 0), "key of row 5 is ndarray"),
        (("add \udcff", "return", 0), "query of row 5 is not Unicode"),
    ],
)
def test_an_invalid_row_is_named(tokenizer, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        build(Rows(*GOOD, row), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_groups_may_be_any_integers_and_booleans(tokenizer, tmp_path):
    groups = [True, np.int64(-(2**31)), np.uint8(7), 2**31 - 1, 0]
    rows = [(f"add {row}", f"return {row}", group) for row, group in enumerate(groups)]
    table = build(Rows(*rows), tokenizer, tmp_path)
    assert table.group.tolist() == [1, -(2**31), 7, 2**31 - 1, 0]


# Damage

FILES = [
    *("query_tokens.npy", "key_tokens.npy", "query_offsets.npy", "key_offsets.npy"),
    *("group.npy", "text.npy", "table.json"),
]


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) - 6] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-2])


def lengthened(file):
    file.write_bytes(file.read_bytes() + b"\0\0")


def swapped_for_a_folder(file):
    file.unlink()
    file.mkdir()


def swapped_for_a_pipe(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = [
    *(flipped, cut, lengthened, lambda file: file.write_bytes(b""), os.unlink),
    *(swapped_for_a_folder, swapped_for_a_pipe),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_table_is_rebuilt_with_a_message(tokenizer, tmp_path, capsys, name, damage):
    build(pairs(), tokenizer, tmp_path)
    [table] = tmp_path.iterdir()
    damage(table / name)
    source = pairs()
    rows = np.arange(NUM_ROWS)
    batch = table_batch(build(source, tokenizer, tmp_path), rows)
    assert source.rows_read == NUM_ROWS
    np.testing.assert_array_equal(
        batch["key"]["tokens"], directly(tokenizer, KEYS, width=MAX_TOKENS["key"])
    )
    np.testing.assert_array_equal(batch["group"], GROUPS)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("rebuilding the token table: ")
    assert name in line
    assert list(tmp_path.iterdir()) == [table]
    assert build(source, tokenizer, tmp_path).num_rows == source.rows_read == NUM_ROWS  # complete


@pytest.mark.parametrize("name", ["key_tokens.npy", "key_offsets.npy", "table.json"])
def test_a_damaged_table_of_prompts_and_lengths_is_built_again(tokenizer, tmp_path, name):
    rule = {"special_tokens": False, "prompt": "return ", "exclude_prompt": True}
    wanted = build(pairs(), tokenizer, tmp_path, **rule).side("key", np.arange(NUM_ROWS))
    [table] = tmp_path.iterdir()
    flipped(table / name)
    source = pairs()
    found = build(source, tokenizer, tmp_path, **rule).side("key", np.arange(NUM_ROWS))
    assert source.rows_read == NUM_ROWS
    assert found.keys() == {"tokens", "length", "prompt_length"}
    for leaf in found:
        np.testing.assert_array_equal(found[leaf], wanted[leaf])


@pytest.mark.parametrize("swap", [swapped_for_a_pipe, lambda path: path.write_bytes(b"")])
def test_something_else_in_a_table_s_place_is_replaced(tokenizer, tmp_path, swap):
    build(pairs(), tokenizer, tmp_path)
    [table] = tmp_path.iterdir()
    table.rename(tmp_path / "elsewhere")
    table.touch()
    swap(table)
    assert build(pairs(), tokenizer, tmp_path).num_rows == NUM_ROWS


def test_a_table_of_other_things_under_the_same_name_is_built_again(tokenizer, tmp_path):
    build(pairs(), tokenizer, tmp_path / "a")
    build(InMemoryPairs(KEYS, QUERIES), tokenizer, tmp_path / "b")
    ([table], [other]) = ((tmp_path / name).iterdir() for name in "ab")
    shutil.rmtree(table)
    other.rename(table)
    tokens = build(pairs(), tokenizer, tmp_path / "a").side("key", np.arange(NUM_ROWS))["tokens"]
    np.testing.assert_array_equal(tokens, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))


def with_right_digests(table, name, change):
    """Change a column and its digest, as a faulty writer would have written both."""
    column = np.load(table / f"{name}.npy")
    change(column)
    np.save(table / f"{name}.npy", column)
    index = read_sealed_json(table / "table.json")
    index["columns"][name] = checked_array.array_record(table / f"{name}.npy")
    write_sealed_json(table / "table.json", index)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("key_tokens", 3, 60_000),  # beyond the vocabulary
        ("key_offsets", 2, 0),  # decreases
        ("key_offsets", 0, 1),
        ("query_offsets", -1, 10**6),  # past the end of the tokens
    ],
)
def test_a_table_that_reads_out_of_range_is_built_again(tokenizer, tmp_path, name, place, value):
    build(pairs(), tokenizer, tmp_path)
    [table] = tmp_path.iterdir()
    with_right_digests(table, name, lambda column: column.__setitem__(place, value))
    source = pairs()
    read = build(source, tokenizer, tmp_path).side("key", np.arange(NUM_ROWS))["tokens"]
    np.testing.assert_array_equal(read, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))
    assert source.rows_read == NUM_ROWS


def test_a_sound_table_with_changed_labels_and_right_digests_is_kept(tokenizer, tmp_path):
    """Without this, the test above could pass because `with_right_digests` writes wrong digests."""
    build(pairs(), tokenizer, tmp_path)
    [table] = tmp_path.iterdir()
    with_right_digests(table, "group", lambda column: column.__setitem__(0, 9))
    source = pairs()
    assert build(source, tokenizer, tmp_path).group[0] == 9
    assert source.rows_read == 0


@pytest.mark.parametrize("damage", [flipped, cut])
def test_damage_that_a_batch_meets_in_the_middle_of_a_run_is_mended(
    tokenizer, tmp_path, monkeypatch, capsys, damage
):
    monkeypatch.setattr(checked_array, "_CHUNK_BYTES", 128 + 16)  # 8 ids after the header
    source = pairs()
    build(source, tokenizer, tmp_path)
    table = build(source, tokenizer, tmp_path)
    first = table.side("key", np.array([0]))["tokens"]
    [folder] = tmp_path.iterdir()
    damage(folder / "key_tokens.npy")
    np.testing.assert_array_equal(table.side("key", np.array([0]))["tokens"], first)
    assert source.rows_read == NUM_ROWS
    assert capsys.readouterr().err == ""
    tokens = table.side("key", np.arange(NUM_ROWS))["tokens"]
    np.testing.assert_array_equal(tokens, directly(tokenizer, KEYS, width=MAX_TOKENS["key"]))
    assert source.rows_read == 2 * NUM_ROWS
    assert "rebuilding the token table: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["key_offsets", "group", "text"])
def test_later_damage_of_a_column_that_was_read_whole_does_not_reach_the_run(
    tokenizer, tmp_path, name
):
    table = build(pairs(), tokenizer, tmp_path)
    wanted = table_batch(table, np.arange(NUM_ROWS))
    [folder] = tmp_path.iterdir()
    with (folder / f"{name}.npy").open("r+b") as file:
        file.seek(128)
        file.write(b"\xff" * 8)
    found = table_batch(table, np.arange(NUM_ROWS))
    np.testing.assert_array_equal(found["key"]["tokens"], wanted["key"]["tokens"])
    for label in ("group", "text"):
        np.testing.assert_array_equal(found[label], wanted[label])


def test_a_disk_that_never_returns_what_was_written_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(column_folder, "array_record", lambda path: {"bytes": 0, "digests": []})
    with pytest.raises(OSError, match=r"right after it was written; set run\.data_dir"):
        build(pairs(), tokenizer, tmp_path)


def test_a_full_disk_names_the_table_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(path, column):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_table.np, "save", full)
    with pytest.raises(OSError, match=r"cannot write the token table .*No space left .*make room"):
        build(pairs(), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    assert table.tokens["query"].array.dtype == dtype
    keys = table_batch(table, np.array([0]))["key"]["tokens"]
    np.testing.assert_array_equal(keys, [[2, vocabulary_size - 1, 0, 0, 0, 0, 0]])
    assert keys.dtype == np.int32


def test_ids_with_gaps_between_them_are_kept_whole(tmp_path):
    """A small vocabulary from elsewhere may have a token id above 2¹⁶."""
    table = build(InMemoryPairs(["far"], ["far"]), word_level({"far": 2**16 + 5}), tmp_path)
    assert table_batch(table, np.array([0]))["query"]["tokens"][0, 0] == 2**16 + 5


def test_a_source_without_groups_has_group_0_throughout(tokenizer, tmp_path):
    table = build(InMemoryPairs(QUERIES, KEYS), tokenizer, tmp_path)
    assert table_batch(table, np.arange(NUM_ROWS))["group"].tolist() == [0] * NUM_ROWS


def test_tokens_stay_on_disk(tokenizer, tmp_path):
    table = build(pairs(), tokenizer, tmp_path)
    for side in ("query", "key"):
        assert isinstance(table.tokens[side].array.whole(), np.memmap)
        assert not table.tokens[side].array.whole().flags.writeable


def test_rows_of_equal_queries_or_keys_are_of_one_text(tokenizer, tmp_path):
    queries = ["add one", "add two", "add one", "sub", "mul", "sub"]
    keys = ["return a", "return b", "return c", "return c", "return d", "return e f"]
    pairs = InMemoryPairs(queries, keys)
    table = build(pairs, tokenizer, tmp_path)
    # 0 and 2 share a query, 2 and 3 a key, 3 and 5 a query.
    assert table.text[[0, 2, 3, 5]].tolist() == [table.text[0]] * 4
    assert len(set(table.text.tolist())) == 3
    assert table_batch(table, np.array([4, 1]))["text"].tolist() == table.text[[4, 1]].tolist()


@pytest.mark.parametrize(
    ("rule", "room"),
    [
        ({"special_tokens": False}, 5),
        ({"special_tokens": True}, 3),
        ({"special_tokens": False, "prompt": "query: "}, 3),
        ({"special_tokens": False, "prompt": "c "}, 4),
    ],
)
def test_texts_that_agree_up_to_truncation_count_as_one_text(tmp_path, rule, room):
    queries = ["a b", "", "a b", "c", "a b c a", "a b c b"]
    keys = ["a", "b", "c", "a a", "b b", "c c"]
    table = build(
        InMemoryPairs(queries, keys),
        word_tokenizer(),
        tmp_path,
        max_tokens={"query": 5, "key": 5},
        **rule,
    )
    assert table.text[0] == table.text[2]
    assert (table.text[4] == table.text[5]) == (room == 3)
    assert len(set(table.text.tolist())) == (4 if room == 3 else 5)


def test_texts_without_tokens_count_as_one_text_of_length_0(tokenizer, tmp_path):
    table = build(InMemoryPairs(["", " "], ["", "\n"]), tokenizer, tmp_path, special_tokens=False)
    for side, width in MAX_TOKENS.items():
        inputs = table.side(side, np.array([1, 0, 1]))
        np.testing.assert_array_equal(inputs["tokens"], np.zeros((3, width)))
        assert inputs["length"].tolist() == [0, 0, 0]
    assert len(set(table.text.tolist())) == 1


def test_texts_that_agree_as_far_as_they_are_read_are_one(tokenizer, tmp_path):
    same = "return x1 + 1 and then some more of it"
    pairs = InMemoryPairs(["a", "b"], [f"{same} {end}" for end in ("here", "there")])
    table = build(pairs, tokenizer, tmp_path)
    assert len(set(table.text.tolist())) == 1
