"""Reading pairs from TFDS data sets without TensorFlow, and from memory."""

import base64
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxcl.data.digests import DIGESTS_FILE
from jaxcl.data.sources import DESCRIPTION_FILE, InMemoryPairs, PairSource, open_pairs
from jaxcl.host.files import read_sealed_json, write_sealed_json

LABELS = ("no", "yes")
NUM_ROWS = 20
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAC0lEQVR4nGNgQAYAAA4AAamRc7EAAAAASUVORK5CYII="
)
"""Two by two black points."""


def example(i: int) -> dict:
    return {
        "question": f"Frage {i}: schön?",
        "answer": {"text": f"answer {i}", "source": f"source {'cab'[i % 3]}"},
        "label": LABELS[i % 2],
        "good": i % 4 == 0,
        "number": i * 10,
        "large": 2**31 - 1 + (i == 7),
        "vector": np.arange(i, i + 3, dtype=np.float32),
        "image": io.BytesIO(PNG),
        "words": ["one", "two"],
        "spans": [{"text": "one", "start": 0}],
    }


class TinyQuestions(tfds.core.GeneratorBasedBuilder):
    """A data set of nested, labelled rows."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {"1.2.0": "The first."}  # noqa: RUF012 - as TFDS wants it

    def _info(self):
        text = tfds.features.Text
        features = {
            "question": text(),
            "answer": tfds.features.FeaturesDict({"text": text(), "source": text()}),
            "label": tfds.features.ClassLabel(names=LABELS),
            "good": np.bool_,
            "number": np.int64,
            "large": np.int64,
            "vector": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "image": tfds.features.Image(shape=(2, 2, 3)),
            "words": tfds.features.Sequence(text()),
            "spans": tfds.features.Sequence({"text": text(), "start": np.int32}),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0, NUM_ROWS),
            "dev": self._generate_examples(50, 53),
        }

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, example(i)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    TinyQuestions(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


@pytest.fixture
def version_dir(data_dir, tmp_path):
    """A copy, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (data_dir / "tiny_questions" / "1.2.0").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


FIELDS = {"query_field": "question", "key_field": "answer/text"}


def open_tiny(data_dir, split="train", **options):
    return open_pairs("tiny_questions:1.2.0", split, data_dir=data_dir, **FIELDS | options)


def row(i: int) -> dict:
    return {"query": f"Frage {i}: schön?", "key": f"answer {i}"}


@pytest.fixture(params=["memory", "tfds"])
def pairs(request, data_dir):
    """A source of each kind, with the same rows."""
    if request.param == "tfds":
        return open_tiny(data_dir, group_field="number", metadata_fields=("label",))
    return InMemoryPairs(
        [row(i)["query"] for i in range(NUM_ROWS)],
        [row(i)["key"] for i in range(NUM_ROWS)],
        groups=[i * 10 for i in range(NUM_ROWS)],
        metadata={"label": [i % 2 for i in range(NUM_ROWS)]},
    )


def test_rows_have_the_requested_order(pairs):
    assert isinstance(pairs, PairSource)
    assert len(pairs) == NUM_ROWS
    for rows in ([3, 1, 1, 19], np.array([3, 1, 1, 19], np.int32), np.array([0]), []):
        assert pairs.read(rows) == [row(i) | {"group": i * 10, "label": i % 2} for i in rows]
    assert type(pairs.read([2])[0]["group"]) is np.int32


@pytest.mark.parametrize("rows", [[-1], [0, NUM_ROWS]])
def test_a_row_that_is_not_there_is_an_error(pairs, rows):
    with pytest.raises(IndexError, match="there are 20"):
        pairs.read(rows)


def test_a_pickled_source_reads_the_same(pairs):
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.read([5, 2]) == pairs.read([5, 2])
    assert copy.fingerprint == pairs.fingerprint


def test_a_directory_and_a_name_are_the_same_rows(data_dir):
    by_name = open_tiny(data_dir)
    newest = open_pairs("tiny_questions", "train", data_dir=data_dir, **FIELDS)
    directory = data_dir / "tiny_questions" / "1.2.0"
    by_directory = open_pairs(directory, "train", **FIELDS)
    everything = range(NUM_ROWS)
    assert by_name.read(everything) == by_directory.read(everything) == newest.read(everything)
    assert by_name.fingerprint == by_directory.fingerprint == newest.fingerprint


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:10%]", [0, 1]),
        ("train[-3:]", [17, 18, 19]),
        ("train[2:4]+dev", [2, 3, 50, 51, 52]),
    ],
)
def test_parts_of_splits_can_be_read(data_dir, split, rows):
    part = open_tiny(data_dir, split)
    assert part.read(range(len(part))) == [row(i) for i in rows]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("label", [0, 1, 0, 1]),
        ("good", [1, 0, 0, 0]),
        ("number", [0, 10, 20, 30]),
        ("answer/source", [2, 0, 1, 2]),  # c a b c, of a b c
    ],
)
def test_groups_become_int32(data_dir, field, expected):
    rows = open_tiny(data_dir, group_field=field).read(range(4))
    assert [row["group"] for row in rows] == expected
    assert {type(row["group"]) for row in rows} == {np.int32}


def test_a_group_field_can_be_metadata_as_well(data_dir):
    fields = ("answer/source", "vector")
    pairs = open_tiny(data_dir, group_field="answer/source", metadata_fields=fields)
    [found] = pairs.read([4])
    assert (found["group"], found["answer/source"]) == (0, "source a")
    np.testing.assert_array_equal(found["vector"], [4.0, 5.0, 6.0])


def test_a_score_field_is_the_score_of_each_row(data_dir):
    pairs = open_tiny(data_dir, score_field="number")
    assert [row["score"] for row in pairs.read([3, 0])] == [30, 0]
    assert pairs.fingerprint != open_tiny(data_dir).fingerprint
    with pytest.raises(ValueError, match=r"metadata cannot be named \['score'\]"):
        open_tiny(data_dir, score_field="number", metadata_fields=("score",))


def test_a_group_beyond_int32_is_an_error(data_dir):
    pairs = open_tiny(data_dir, group_field="large")
    assert pairs.read([6])[0]["group"] == 2**31 - 1
    with pytest.raises(ValueError, match="2147483648 of row 7 in 'large' does not fit"):
        pairs.read([7])


def test_equal_rows_have_equal_fingerprints_and_others_have_others(data_dir):
    base = open_tiny(data_dir)
    assert open_tiny(data_dir, "train[:100%]").fingerprint == base.fingerprint
    assert open_tiny(data_dir, metadata_fields=("label",)).fingerprint == base.fingerprint
    others = [
        open_tiny(data_dir, "dev"),
        open_tiny(data_dir, "train[:10]"),
        open_tiny(data_dir, "train[10:]"),
        open_tiny(data_dir, key_field="answer/source"),
        open_tiny(data_dir, group_field="label"),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_fingerprint_next_to_the_records_represents_their_content(version_dir):
    def fingerprint():
        return open_pairs(version_dir, "train", **FIELDS).fingerprint

    plain = fingerprint()
    (version_dir / DESCRIPTION_FILE).write_text('{"fingerprint": "abc"}')
    described = fingerprint()
    (version_dir / DESCRIPTION_FILE).write_text('{"fingerprint": "abd"}')
    assert len({plain, described, fingerprint()}) == 3


def rewrite(shard: Path, change) -> None:
    """Rewrite a record file, with `change(record)` for each record."""
    reader = ArrayRecordReader(str(shard))
    records = reader.read_all()
    reader.close()
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for record in records:
        writer.write(change(record))
    writer.close()


def test_a_shard_of_another_size_changes_the_fingerprint(version_dir):
    before = open_pairs(version_dir, "train", **FIELDS).fingerprint
    [shard] = version_dir.glob("*-train.array_record*")
    size = shard.stat().st_size
    rewrite(shard, lambda record: record + bytes(10_000))
    assert shard.stat().st_size > size
    assert open_pairs(version_dir, "train", **FIELDS).fingerprint != before


def test_other_bytes_of_the_same_size_change_the_fingerprint(version_dir):
    def fingerprint():
        return open_pairs(version_dir, "train", **FIELDS).fingerprint

    [shard] = version_dir.glob("*-train.array_record*")
    rewrite(shard, lambda record: record)
    size = shard.stat().st_size
    before = fingerprint()
    rewrite(shard, lambda record: record.replace(b"answer 7", b"answer 8"))
    assert shard.stat().st_size == size
    after = fingerprint()
    assert after != before
    # A file with an unchanged time stamp is not read again.
    remembered = version_dir / DIGESTS_FILE
    digests = read_sealed_json(remembered)
    digests[shard.name][-1] = "remembered"
    write_sealed_json(remembered, {"another-split.array_record": [1, 2, "3"], **digests})
    content = remembered.read_text()
    assert fingerprint() not in (before, after)
    assert remembered.read_text() == content  # nothing was new, so nothing was written
    for damaged in ("cut sh", "[]", "{}", "5", content.replace("remembered", "Remembered")):
        remembered.write_text(damaged)
        assert fingerprint() == after


def test_a_flipped_byte_of_a_record_is_an_error_that_names_the_data_set(version_dir):
    [shard] = version_dir.glob("*-train.array_record*")
    rewrite(shard, lambda record: record)  # without compression
    content = bytearray(shard.read_bytes())
    content[content.index(b"answer 7")] ^= 1
    shard.write_bytes(content)
    pairs = open_pairs(version_dir, "train", **FIELDS)
    with pytest.raises(ValueError, match=r"copy is damaged .*prepare the data set again"):
        pairs.read(range(NUM_ROWS))


@pytest.mark.parametrize("content", ["[]", "{}", "5", "null", '""', ""])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", DESCRIPTION_FILE])
def test_a_description_of_something_else_is_an_error_that_names_the_data_set(
    version_dir, name, content
):
    (version_dir / name).write_text(content)
    with pytest.raises(ValueError, match="copy") as caught:
        open_pairs(version_dir, "train", **FIELDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"no split 'test'; it has \['dev', 'train'\]"),
        ({"split": "train[5:"}, r"no split 'train\[5:'"),
        ({"split": "train[:0]"}, r"has no rows; the splits have .*'train': 20"),
        ({"query_field": "query"}, r"no field 'query'; it has \['answer/source', 'answer/text', "),
        ({"key_field": "answer"}, r"no field 'answer'; it has"),
        ({"metadata_fields": ("title",)}, "no field 'title'"),
        ({"group_field": "vector"}, "holds Tensor"),
        ({"group_field": "image"}, "holds Image"),
        ({"text_sides": ("key",), "key_field": "number"}, "'number' of .* int; .* as key_field"),
        (
            {"text_sides": ("query",), "query_field": "vector"},
            "'vector' .* Tensor; .* query_field",
        ),
        ({"text_sides": ("key",), "key_field": "image"}, "'image' of .* Image; .* as key_field"),
        ({"text_sides": ("key",), "key_field": "words"}, "'words' of .* Sequence; .* key_field"),
        ({"text_sides": ("key",), "key_field": "spans"}, "'spans' of .* Sequence; .* key_field"),
        ({"text_sides": ("key",), "key_field": "label"}, "'label' of .* int; .* as key_field"),
        ({"text_sides": ("key",), "key_field": "good"}, "'good' of .* bool; .* as key_field"),
        ({"metadata_fields": ("query",)}, r"cannot be named \['query'\]"),
    ],
)
def test_a_wrong_option_is_explained(data_dir, options, message):
    with pytest.raises(ValueError, match=message):
        open_tiny(data_dir, **options)


def test_a_data_set_that_is_not_prepared_says_where_and_how(tmp_path):
    with pytest.raises(ValueError, match="is not prepared") as error:
        open_pairs("snli:1.1.0", "train", data_dir=tmp_path)
    message = str(error.value)
    assert f"looked in ['{tmp_path}']" in message
    command = f"tfds.builder('snli:1.1.0', data_dir='{tmp_path}', file_format='array_record')"
    assert command in message
    assert not list(tmp_path.iterdir())  # nothing was started


def test_an_unknown_data_set_or_version_lists_the_existing_ones(data_dir):
    for name in ("tiny_answers", "tiny_questions:9.9.9"):
        with pytest.raises(ValueError, match=r"where there is tiny_questions:1\.2\.0"):
            open_pairs(name, "train", data_dir=data_dir, **FIELDS)


def test_a_directory_without_a_data_set_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no prepared data set"):
        open_pairs(tmp_path, "train")


def test_another_file_format_is_explained(version_dir):
    path = version_dir / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    for file in version_dir.glob("*.array_record*"):
        file.rename(version_dir / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"is prepared as tfrecord.*file_format='array_record'"):
        open_pairs(version_dir, "train", **FIELDS)


def test_a_missing_shard_is_named(version_dir):
    [shard] = version_dir.glob("*-train.array_record*")
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        open_pairs(version_dir, "train", **FIELDS)


def test_memory_fingerprints_follow_the_content():
    base = InMemoryPairs(["a", "b"], ["c", "d"])
    assert InMemoryPairs(("a", "b"), ["c", "d"]).fingerprint == base.fingerprint
    others = [
        InMemoryPairs(["b", "a"], ["c", "d"]),
        InMemoryPairs(["a", "b"], ["c", "e"]),
        InMemoryPairs(["a", "b"], ["c", "d"], groups=[0, 1]),
        InMemoryPairs(["a", "b"], ["c", "d"], groups=[0, 2]),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], ["b", "c"]), {}, "differ in length"),
        ((["a"], ["b"]), {"groups": [1, 2]}, "differ in length"),
        (([], []), {}, "no pairs"),
        ((["a"], ["b"]), {"groups": [2**31]}, "int32"),
        ((["a", "c"], ["b", "d"]), {"groups": np.array([0, 2**40])}, "1099511627776 of row 1 .*32"),
        ((["a", "c"], ["b", "d"]), {"groups": np.array([0, 2**63], np.uint64)}, "row 1 .* int32"),
        ((["a"], ["b"]), {"groups": [-(2**31) - 1]}, "int32"),
        ((["a"], ["b"]), {"groups": [0.5]}, r"group of row 0 in 'groups' is 0\.5; use integers"),
        ((["a"], ["b"]), {"groups": np.array([1.0])}, r"is 1\.0; use integers"),
        ((["a"], ["b"]), {"groups": ["x"]}, "is 'x'; use integers"),
        ((["a"], ["b"]), {"groups": [None]}, "is None; use integers"),
        ((["a"], ["b"]), {"metadata": {"key": [1]}}, "cannot be named"),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_wrong_columns_are_explained(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        InMemoryPairs(*arguments, **options)


def run_python(code: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.strip()


def test_memory_needs_no_tfds_and_tfds_no_tensorflow(data_dir):
    memory = "from jaxcl.data.sources import InMemoryPairs; InMemoryPairs(['a'], ['b']).fingerprint"
    reading = (
        "from jaxcl.data.sources import open_pairs; p = open_pairs('tiny_questions', 'train', "
        f"data_dir={str(data_dir)!r}, query_field='question', key_field='label'); p.read([0])"
    )
    loaded = "import sys; print([n in sys.modules for n in ('tensorflow_datasets', 'tensorflow')])"
    assert run_python(f"{memory}; {loaded}") == "[False, False]"
    assert run_python(f"{reading}; {loaded}") == "[True, False]"
