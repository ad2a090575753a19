"""Files of pairs as sources: rows in any order, and splits that appended rows do not change."""

import json
import pickle
import re
import shutil

import numpy as np
import pyarrow
import pytest
from jaxcl.configs.pairs import get_config
from pyarrow import ipc, parquet

from jaxcl.data import pair_cache, pair_conversion, pair_files
from jaxcl.data.pair_files import FilePairs
from jaxcl.data.sources import PairSource
from jaxcl.data.splits import open_splits
from jaxcl.settings.read import read_settings

NUM_ROWS = 300


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def plain_rows(count=NUM_ROWS, first=0):
    """Rows with three rows per query."""
    return [{"query": f"query {i // 3}", "key": f"key {i}"} for i in range(first, first + count)]


@pytest.fixture
def opened(tmp_path):
    """Open the splits of a file in this test's folder, with changes to `config.data`."""

    def open_with(name="pairs.jsonl", splits=None, **changes):
        data = get_config("smoke").data.to_dict()
        files = {field: changes.pop(field) for field in list(changes) if field in data["files"]}
        data["files"] |= files
        data |= {"name": str(tmp_path / name), "splits": splits or data["splits"], **changes}
        settings = read_settings({"data": data}).data
        return open_splits(settings, settings.name, data_dir=tmp_path / "shared")

    return open_with


@pytest.fixture
def said(monkeypatch):
    lines = []
    for module in (pair_files, pair_conversion):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


WHOLE = {"train": "train"}


def all_rows(source):
    return source.read(np.arange(len(source)))


def test_rows_are_read_in_any_order(opened, tmp_path):
    rows = plain_rows()
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = opened(splits=WHOLE)["train"]
    assert isinstance(train, PairSource)
    assert all_rows(train) == rows
    chosen = [299, 0, 7, 7, 4]
    assert train.read(chosen) == [rows[row] for row in chosen]
    assert train.read([]) == []
    with pytest.raises(IndexError, match="there are 300"):
        train.read([300])
    other = pickle.loads(pickle.dumps(train))
    assert other.read([1]) == [rows[1]]
    assert other.fingerprint == train.fingerprint


FULL = [
    {"anchor": "ä", "positive": ["b", "c"], "neg": ["d", "e"], "scores": [3, 2, 1, 0.5], "g": "y"},
    {"anchor": "f", "positive": ["h"], "neg": [], "scores": [7], "g": "x"},
    {"anchor": "i", "positive": ["j"], "neg": ["k"], "scores": [5, 4], "g": "y"},
]
FULL_ROWS = [
    {"query": "ä", "key": "b", "group": 1, "negatives": ["d", "e"], "teacher_scores": [3, 1, 0.5]},
    {"query": "ä", "key": "c", "group": 1, "negatives": ["d", "e"], "teacher_scores": [2, 1, 0.5]},
    {"query": "f", "key": "h", "group": 0, "negatives": [], "teacher_scores": [7]},
    {"query": "i", "key": "j", "group": 1, "negatives": ["k"], "teacher_scores": [5, 4]},
]


def write_folder(folder, records):
    """Write records to two files, as `save_to_disk` of Hugging Face's datasets does."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(records)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table[:1], table[1:]), strict=True):
        with ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))


def write_full(path, records):
    if path.suffix == ".jsonl":
        write_jsonl(path, records)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        write_folder(path, records)


def test_long_texts_are_read_in_parts(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_cache, "_GATHERED_BYTES", 64)
    rows = [{"query": f"{i} é" * (i % 7 + 1), "key": "x" * i + "y"} for i in range(200)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = opened(splits=WHOLE)["train"]
    chosen = np.random.default_rng(0).integers(len(rows), size=300)
    assert train.read(chosen) == [rows[row] for row in chosen]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "folder"])
def test_several_positives_are_consecutive_rows_with_the_same_negatives(opened, tmp_path, name):
    write_full(tmp_path / name, FULL)
    train = opened(name, WHOLE, group_field="g")["train"]
    assert all_rows(train) == FULL_ROWS
    assert train.read([3, 1]) == [FULL_ROWS[3], FULL_ROWS[1]]
    assert all(record["group"].dtype == np.int32 for record in train.read([0, 2]))


def test_rows_of_several_blocks_keep_their_negatives(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_cache, "_BLOCK", 2)
    write_jsonl(tmp_path / "pairs.jsonl", 5 * FULL)
    assert all_rows(opened(splits=WHOLE, group_field="g")["train"]) == 5 * FULL_ROWS


def test_all_positives_of_a_record_are_in_its_split(opened, tmp_path):
    records = [
        {"query": f"query {i}", "positives": [f"key {i} {j}" for j in range(1 + i % 3)]}
        for i in range(90)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", records)
    splits = opened(splits={"train": "rest", "validation": "train[:30%]"})
    chosen = {role: {row["query"] for row in all_rows(one)} for role, one in splits.items()}
    assert chosen["train"] | chosen["validation"] == {record["query"] for record in records}
    for role, queries in chosen.items():
        assert len(queries) > 10
        wanted = [
            {"query": record["query"], "key": key}
            for record in records
            if record["query"] in queries
            for key in record["positives"]
        ]
        assert all_rows(splits[role]) == wanted
    assert not chosen["train"] & chosen["validation"]


def test_metadata_and_integer_groups_are_kept(opened, tmp_path):
    rows = [{**row, "n": i, "tags": ["a", None]} for i, row in enumerate(plain_rows(5))]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = opened(splits=WHOLE, group_field="n", metadata_fields=("tags", "n"))["train"]
    assert train.read([4, 2]) == [{**rows[row], "group": row} for row in (4, 2)]


def test_a_pattern_reads_its_files_in_order(opened, tmp_path):
    for number in (1, 0):
        write_jsonl(tmp_path / f"part-{number}.jsonl", plain_rows(10, first=10 * number))
    assert all_rows(opened("part-*.jsonl", WHOLE)["train"]) == plain_rows(20)


def test_a_folder_of_several_splits_has_them_by_name(opened, tmp_path):
    write_folder(tmp_path / "both" / "train", plain_rows(30))
    write_folder(tmp_path / "both" / "dev", plain_rows(6, first=30))
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "dev"]}))
    splits = opened("both", {"train": "rest", "validation": "dev", "test": "train[:50%]"})
    assert all_rows(splits["validation"]) == plain_rows(6, first=30)
    assert len(splits["train"]) + len(splits["test"]) == 30
    with pytest.raises(ValueError, match=r"both has no split 'test'; it has \['train', 'dev'\]"):
        opened("both", {"train": "train", "validation": "test"})


def test_the_split_of_a_row_does_not_change_when_rows_are_appended(opened, tmp_path):
    splits = {"train": "rest", "validation": "train[:20%]", "test": "train[90%:]"}

    def queries():
        by_role = opened(splits=splits)
        return {role: [row["query"] for row in all_rows(one)] for role, one in by_role.items()}

    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    before = queries()
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows(2 * NUM_ROWS))
    after = queries()
    for role, texts in before.items():
        assert after[role][: len(texts)] == texts
        assert len(after[role]) > len(texts)
    # Each query is in one split, with all three of its rows, and no row is lost.
    assert sum(map(len, after.values())) == 2 * NUM_ROWS
    assert sum(len(set(texts)) for texts in after.values()) == 2 * NUM_ROWS / 3
    shares = {role: len(texts) / (2 * NUM_ROWS) for role, texts in after.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.2, "test": 0.1}, abs=0.08)


def test_rows_may_be_split_by_another_column(opened, tmp_path):
    rows = [{**row, "page": f"page {i % 10}"} for i, row in enumerate(plain_rows())]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    splits = opened(split_by="page", splits={"train": "rest", "validation": "train[:30%]"})
    pages = {
        role: {(int(row["key"].split()[1])) % 10 for row in all_rows(source)}
        for role, source in splits.items()
    }
    assert pages["train"] | pages["validation"] == set(range(10))
    assert not pages["train"] & pages["validation"]


def test_held_out_rows_are_not_training_rows(opened, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "copy.jsonl")
    copy = str(tmp_path / "copy.jsonl")
    for splits in (
        {"train": "train", "validation": "train[:5%]"},
        {"train": "train[:96%]", "validation": "train[95%:]"},
        {"train": "train[:50%]", "validation": copy},
    ):
        with pytest.raises(ValueError, match=r"holds out rows that data.splits.train=.* in both"):
            opened(splits=splits)
    opened(splits={"train": "train[:95%]", "validation": "train[95%:]"})


def test_equal_queries_in_a_held_out_file_are_reported(opened, tmp_path, said):
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows(30))
    write_jsonl(tmp_path / "dev.jsonl", plain_rows(6, first=27))
    splits = {"train": "rest", "validation": str(tmp_path / "dev.jsonl")}
    assert {role: len(one) for role, one in opened(splits=splits).items()} == {
        "train": 30,
        "validation": 6,
    }
    assert "warning: 1 of 2 different values of 'query' in validation" in said[-1]
    write_jsonl(tmp_path / "dev.jsonl", plain_rows(6, first=30))
    del said[:]
    opened(splits=splits)
    assert not any("are also in train" in line for line in said)


def test_held_out_queries_with_several_keys_are_reported(opened, tmp_path, said):
    rows = [{"query": f"query {i}", "positives": [f"a {i}", f"b {i}"]} for i in range(9)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    opened(splits={"train": "rest", "validation": "train[:50%]"})
    assert not any("warning" in line for line in said)
    (line,) = (line for line in said if "different queries" in line)
    pairs = int(re.search(r"validation has (\d+) pairs", line)[1])
    assert 0 < pairs < 18
    assert f"{pairs} pairs of {pairs // 2} different queries" in line
    assert "other keys of its query are left out of the ranking" in line
    del said[:]
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows(90)[::3])
    opened(splits={"train": "rest", "validation": "train[:50%]"})
    assert not any("different queries" in line for line in said)


def test_the_first_line_names_the_detected_kind(opened, tmp_path, said):
    write_jsonl(tmp_path / "pairs.jsonl", [{**record, "url": "u"} for record in FULL])
    opened(splits=WHOLE, group_field="g")
    assert said == [
        f"{tmp_path}/pairs.jsonl: 3 rows, 4 pairs for train; query from 'anchor', "
        "key from 'positive', negatives from neg, teacher scores from scores, group from g, "
        "not used: url"
    ]


BAD_LINES = '{"query": "a"}\n{"query": "a", "key": ""}\n[]\nnonsense\n{"query": 1, "key": "b"}\n'


def test_bad_rows_are_named_and_counted_or_skipped(opened, tmp_path, said):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"query": "a", "key": "b"}) + "\n"
    path.write_text(good + 3 * BAD_LINES + good)
    with pytest.raises(ValueError, match=r"^15 rows cannot be used: pairs.jsonl line 2: ") as error:
        opened(splits=WHOLE)
    message = str(error.value)
    assert "line 3: 'key' is empty; pairs.jsonl line 4: the line is not a JSON object" in message
    assert "; and 10 more. Correct the data, or set data.files.bad_rows='skip'" in message
    assert len(opened(splits=WHOLE, bad_rows="skip")["train"]) == 2
    assert "skipped: 15 rows cannot be used: pairs.jsonl line 2: there is no 'key'" in said[-1]
    path.write_text(good + 1000 * BAD_LINES)
    with pytest.raises(ValueError, match=r"^1,000 or more rows cannot be used"):
        opened(splits=WHOLE)
    path.write_text(BAD_LINES)
    with pytest.raises(ValueError, match="no rows to train on: 5 rows cannot be used: "):
        opened(splits=WHOLE, bad_rows="skip")


def test_labels_must_be_dealt_with(opened, tmp_path, said):
    path = tmp_path / "sts.tsv"
    lines = [f"text {i}\tother {i}\t{i / 2}\n" for i in range(11)]
    path.write_text("sentence1\tsentence2\tscore\n" + "".join(lines))
    with pytest.raises(ValueError, match=r"has labels in 'score', .* set data.files.min_label to"):
        opened("sts.tsv", WHOLE)
    train = opened("sts.tsv", WHOLE, min_label=4.0)["train"]
    assert [row["query"] for row in all_rows(train)] == ["text 8", "text 9", "text 10"]
    assert "8 with a label below 4.0 left out" in said[-1]
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    with pytest.raises(ValueError, match=r"min_label=4.0, but .*pairs.jsonl has no column"):
        opened(splits=WHOLE, min_label=4.0)


def test_a_field_that_appears_late_is_not_ignored(opened, tmp_path):
    rows = plain_rows()
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "other": 1}])
    opened(splits=WHOLE)
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "negatives": ["x"]}])
    with pytest.raises(ValueError, match=r"line 301 has negatives, which the first rows lack"):
        opened(splits=WHOLE)
    with pytest.raises(ValueError, match="has only the columns query, key, negatives"):
        opened(splits=WHOLE, negatives_field="negative")
    train = opened(splits=WHOLE, negatives_field="negatives")["train"]
    assert train.read([300, 0]) == [{**rows[0], "negatives": ["x"]}, {**rows[0], "negatives": []}]


def test_one_more_numbered_negative_is_not_ignored(opened, tmp_path):
    rows = [{**row, "negative_1": "x"} for row in plain_rows()]
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "negative_2": "y"}])
    with pytest.raises(ValueError, match=r"line 301 has negative_2, which the first rows lack"):
        opened(splits=WHOLE)
    write_jsonl(tmp_path / "pairs.jsonl", [{**rows[0], "negative_2": "y"}, *rows])
    assert opened(splits=WHOLE)["train"].read([0])[0]["negatives"] == ["x", "y"]


def test_columns_that_the_config_names_are_not_taken_for_late_ones(opened, tmp_path):
    rows = [{**row, "neg": "x", "negatives": ["y"], "score": 1} for row in plain_rows()]
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "other": 1}])
    named = {"negatives_field": "neg", "metadata_fields": ("score",)}
    train = opened(splits=WHOLE, **named)["train"]
    assert train.read([300]) == [{**plain_rows()[0], "negatives": ["x"], "score": 1}]


def test_a_column_of_a_later_file_is_not_ignored(opened, tmp_path):
    parquet.write_table(pyarrow.table({"query": ["a"], "key": ["b"]}), tmp_path / "0.parquet")
    columns = {"query": ["c"], "key": ["d"], "other": ["e"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "1.parquet")
    assert len(opened("*.parquet", WHOLE)["train"]) == 2
    parquet.write_table(pyarrow.table(columns | {"label": [0]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1.parquet has label, which .*0.parquet lacks"):
        opened("*.parquet", WHOLE)


def test_a_file_that_a_pattern_matches_twice_is_read_once(opened, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_jsonl(tmp_path / "a" / "b" / "1.jsonl", plain_rows())
    (tmp_path / "a" / "2.jsonl").symlink_to(tmp_path / "a" / "b" / "1.jsonl")
    assert len(opened("**/**/*.jsonl", WHOLE)["train"]) == NUM_ROWS


def test_scores_are_a_column_of_the_rows(opened, tmp_path, said):
    lines = [f'"text, {i}",other {i},{i / 2}\n' for i in range(11)]
    (tmp_path / "sts.csv").write_text("sentence1,sentence2,score\n" + "".join(lines))
    train = opened("sts.csv", WHOLE, score_field="score")["train"]
    assert all_rows(train)[3] == {"query": "text, 3", "key": "other 3", "score": 1.5}
    assert [row["score"] for row in train.read([10, 0, 10])] == [5.0, 0.0, 5.0]
    assert "scores from score" in said[-1]
    some = opened("sts.csv", WHOLE, score_field="score", label_field="score", min_label=4.0)
    assert [row["score"] for row in all_rows(some["train"])] == [4.0, 4.5, 5.0]
    (tmp_path / "sts.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,high\ne,f,\n")
    with pytest.raises(
        ValueError, match=r"'score' is 'high', .* not a finite number; .* is no 'sc"
    ):
        opened("sts.csv", WHOLE, score_field="score")


def test_a_score_belongs_to_each_positive_of_a_record(opened, tmp_path):
    rows = [{"query": "q", "key": ["a", "b"], "score": 2}, {"query": "r", "key": "c", "score": 3}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train = opened(splits=WHOLE, score_field="score")["train"]
    assert [(row["key"], row["score"]) for row in all_rows(train)] == [
        ("a", 2.0),
        ("b", 2.0),
        ("c", 3.0),
    ]


def test_files_without_scores_keep_the_names_of_their_caches(opened, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [row | {"score": 1} for row in plain_rows()])
    train = opened(splits=WHOLE, min_label=0.0)["train"]
    assert "score" not in train.files.made_from["columns"]
    scored = opened(splits=WHOLE, score_field="score")["train"]
    assert scored.files.made_from["columns"]["score"] == "score"


def test_a_fingerprint_names_content_columns_and_split(opened, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{**row, "url": str(i)} for i, row in enumerate(plain_rows())]
    write_jsonl(path, rows)
    first = opened()["train"].fingerprint
    assert opened()["train"].fingerprint == first
    shutil.copy(path, tmp_path / "copy.jsonl")
    assert opened("copy.jsonl")["train"].fingerprint == first
    others = [
        opened(splits={"train": "rest", "validation": "train[:6%]"})["train"].fingerprint,
        opened(key_field="url")["train"].fingerprint,
        opened(metadata_fields=("url",))["train"].fingerprint,
        opened(split_by="url")["train"].fingerprint,
    ]
    write_jsonl(path, rows[:-1])
    others.append(opened()["train"].fingerprint)
    assert len({first, *others}) == 6


def test_a_file_is_read_once_until_it_changes(opened, tmp_path, monkeypatch):
    reads = []
    original = pair_conversion.read_rows
    monkeypatch.setattr(
        pair_conversion, "read_rows", lambda *given: reads.append(given) or original(*given)
    )
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    for _ in range(2):
        opened()
    assert len(reads) == 1
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows(NUM_ROWS + 1))
    opened()
    assert len(reads) == 2


@pytest.mark.parametrize("column", ["query_bytes.npy", "key_ends.npy", "pairs.json"])
def test_a_damaged_cache_is_written_again(opened, tmp_path, said, column):
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    train = opened(splits=WHOLE)["train"]
    file = train.files.path / column
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert opened(splits=WHOLE)["train"].read([299, 3]) == [plain_rows()[299], plain_rows()[3]]
    assert any("are read again" in line for line in said)


def test_damage_that_shows_while_a_file_that_changed_is_read_is_an_error(opened, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    train = opened(splits=WHOLE)["train"]
    (train.files.path / "key_bytes.npy").unlink()
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows(7))
    with pytest.raises(ValueError, match=r"pairs.jsonl has changed since it was read"):
        FilePairs(train.files)


def test_a_file_that_changes_while_it_is_read_is_refused(opened, tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, plain_rows())
    original = pair_conversion.read_rows

    def read_and_append(*given):
        yield from original(*given)
        write_jsonl(path, plain_rows(NUM_ROWS + 1))

    monkeypatch.setattr(pair_conversion, "read_rows", read_and_append)
    with pytest.raises(ValueError, match=r"pairs\.jsonl has changed while it was read"):
        opened()


def test_a_failed_reading_leaves_no_files(opened, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(BAD_LINES)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^5 rows cannot be used"):
            opened()
    left = [path.name for path in (tmp_path / "shared" / "pairs").iterdir()]
    assert left == ["digests"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"none\.jsonl does not exist"),
        ("none-*.csv", None, r"no file matches .*/none-\*\.csv"),
        ("pairs.txt", "a\tb\n", r"pairs\.txt has an unknown suffix"),
        ("empty.jsonl", "", r"empty\.jsonl has no rows"),
        ("empty.csv", "", r"empty\.csv has no rows"),
        ("header.csv", "query,key\n", r"header\.csv has no rows to train on"),
        ("odd.csv", "a,b\n1,2\n", r"odd\.csv has no columns that are known to be pairs"),
    ],
)
def test_files_without_rows_are_an_error(opened, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        opened(name)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": "dev"}, r"no split 'dev'; .*A file has only the split 'train'"),
        ({"train": "train[:100]"}, r"no split 'train\[:100\]'; give a share"),
        ({"train": "train[:0.0001%]"}, r"has none of the 300 rows of .*give it a larger share"),
        ({"train": "rest", "test": "train"}, r"leaves no rows for 'rest'"),
        ({"train": "rest", "test": "nosuch.jsonl"}, r"nosuch\.jsonl does not exist"),
    ],
)
def test_missing_splits_are_an_error(opened, tmp_path, splits, message):
    write_jsonl(tmp_path / "pairs.jsonl", plain_rows())
    with pytest.raises(ValueError, match=message):
        opened(splits=splits)


def test_files_of_a_pattern_must_have_the_same_columns(opened, tmp_path):
    (tmp_path / "a.csv").write_text("query,key\na,b\n")
    (tmp_path / "b.csv").write_text("query,answer\na,b\n")
    with pytest.raises(ValueError, match=r"b\.csv lacks key, which .*a\.csv has"):
        opened("*.csv", WHOLE)
    (tmp_path / "b.csv").write_text("key,query,more\nc,d,e\n")
    assert opened("*.csv", WHOLE)["train"].read([1]) == [{"query": "d", "key": "c"}]


def test_a_folder_that_names_files_outside_of_it_is_refused(opened, tmp_path):
    write_folder(tmp_path / "folder", plain_rows(4))
    state = {"_data_files": [{"filename": "../secret.arrow"}]}
    (tmp_path / "folder" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json is damaged \(it names '../secret.arrow'\)"):
        opened("folder", WHOLE)


def test_groups_of_two_types_are_an_error(opened, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**plain_rows(1)[0], "g": group} for group in (1, "x")])
    with pytest.raises(ValueError, match="groups are both integers and texts"):
        opened("a.jsonl", WHOLE, group_field="g")
