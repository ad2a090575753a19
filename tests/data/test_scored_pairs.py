"""Pairs of texts with scores, from files as similarity data sets come."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from jaxcl.data.scored_pairs import SCORE_FIELDS, TEXT_FIELDS, read_scored_pairs

PAIRS = [("a cat", "a cat", 5.0), ('say "hi", now', "hello", 0.5), ("naïve\u2028tab\t", "x", 2)]
NAMES = ("sentence1", "sentence2", "score")


def write_pairs(path: Path, *, header=NAMES, pairs=PAIRS, newline="\n") -> Path:
    kind = path.suffixes[0]
    if kind == ".parquet":
        parquet.write_table(
            pyarrow.Table.from_pylist([dict(zip(header, pair, strict=True)) for pair in pairs]),
            path,
        )
        return path
    if kind == ".jsonl":
        lines = [json.dumps(dict(zip(header, pair, strict=True))) for pair in pairs]
    else:
        separator = {".csv": ",", ".tsv": "\t"}[kind]
        quoted = [[f'"{str(one).replace(chr(34), chr(34) * 2)}"' for one in p] for p in pairs]
        lines = [separator.join(row) for row in ([header] if header else []) + quoted]
    content = "".join(line + newline for line in lines).encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "header"),
    [
        *((f"pairs{kind}", NAMES) for kind in (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz")),
        *((f"pairs{kind}", None) for kind in (".csv", ".tsv", ".tsv.gz")),
    ],
)
def test_every_kind_of_file_gives_its_pairs_in_order(tmp_path, name, header, newline):
    pairs = read_scored_pairs(write_pairs(tmp_path / name, header=header, newline=newline))
    found = list(zip(pairs.first, pairs.second, pairs.scores.tolist(), strict=True))
    assert found == PAIRS
    assert pairs.fields == (header or ("column 1", "column 2", "column 3"))
    assert pairs.sides == ("query", "query")


def test_equal_pairs_have_equal_fingerprints_and_others_do_not(tmp_path):
    def fingerprint(name, **options):
        return read_scored_pairs(write_pairs(tmp_path / name, **options)).fingerprint

    assert fingerprint("a.csv") == fingerprint("b.tsv", header=None) == fingerprint("c.jsonl")
    others = [PAIRS[::-1], PAIRS[:2], [*PAIRS[:2], ("naïve\u2028tab\t", "x", 2.5)]]
    others += [[*PAIRS[:2], ("naïve\u2028tab\tx", "", 2)]]
    fingerprints = {fingerprint("d.csv", pairs=pairs) for pairs in [PAIRS, *others]}
    assert len(fingerprints) == 1 + len(others)


@pytest.mark.parametrize("texts", TEXT_FIELDS)
def test_common_names_of_texts_are_recognised_with_their_sides(tmp_path, texts):
    pairs = read_scored_pairs(write_pairs(tmp_path / "a.jsonl", header=(*texts, "label")))
    assert pairs.fields == (*texts, "label")
    assert pairs.sides == ("query", "query" if texts[0][-1] in "12A" else "key")


@pytest.mark.parametrize("score", SCORE_FIELDS)
def test_common_names_of_scores_are_recognised(tmp_path, score):
    path = write_pairs(tmp_path / "a.csv", header=("sentence1", "sentence2", score))
    assert read_scored_pairs(path).scores.tolist() == [5.0, 0.5, 2.0]


def test_named_fields_are_read_instead_of_recognised_ones(tmp_path):
    record = {"sentence1": "a", "sentence2": "b", "score": 1, "left": "c", "right": "d", "mark": 2}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    pairs = read_scored_pairs(path, fields=("left", "right", "mark"))
    assert (pairs.first, pairs.second, pairs.scores.tolist()) == (["c"], ["d"], [2.0])
    with pytest.raises(ValueError, match="give three names"):
        read_scored_pairs(path, fields=("left", "right"))


def test_labels_of_json_may_be_booleans(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", pairs=[("a", "b", True), ("a", "c", False)])
    assert read_scored_pairs(path).scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv has no pairs"),
        ("a.csv", "sentence1,sentence2,score\n", "has no pairs"),
        ("a.jsonl", "", "has no pairs"),
        ("a.json", "[]", "unknown suffix"),
        ("a.csv", "a,b,1\nc,d\n", "line 2 has 2 columns, but the first row has 3"),
        ("a.csv", "a,b,1\nc,d,\n", "line 2: column 3 is ''; give a finite number"),
        ("a.csv", "a,b,1\nc,d,nan\n", "line 2: column 3 is 'nan'"),
        ("a.csv", "a,b,1\nc,d,1_0\n", "line 2: column 3 is '1_0'"),
        ("a.csv", "a,b,inf\nc,d,1\n", "none of the fields a, b, inf is known to hold two texts"),
        ("a.csv", "sentence1,sentence2,x\na,b,1\n", "line 2: none of .* hold a score or a label"),
        ("a.csv", "score,sentence1,score\n1,a,b\n", "line 1: the header has a name twice"),
        ("a.tsv", "a\tb\t1\n\ufffd\tc\t".encode() + b"\xff\n", "line 2 is not UTF-8"),
        ("a.jsonl", '{"text1": "a", "text2": 7, "score": 1}', "line 1: text2 is 7, which is not"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "score": NaN}', "score is nan; give a finite"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "score": null}', "score is None"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "score": [1]}', r"score is \[1\]"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "score": 1e999}', "score is inf"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "score": 1' + "0" * 400 + "}", "score is 1000"),
        (
            "a.jsonl",
            '{"text1": "a", "text2": "b", "score": 1}\n{"text1": "a", "text2": "b"}',
            "line 2: there is no field 'score'; the fields are text1, text2",
        ),
    ],
)
def test_unreadable_lines_are_named_by_number(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_scored_pairs(path)
    assert str(path) in str(error.value)


def test_long_rows_that_are_no_header_are_shortened_in_the_message(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{'word ' * 500},b\nc,d\n")
    with pytest.raises(ValueError, match="known to hold") as error:
        read_scored_pairs(path)
    assert len(str(error.value)) < 400
