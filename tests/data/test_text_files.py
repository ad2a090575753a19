"""Texts from files, in order and in blocks; errors give the line number."""

import csv
import gzip
import io
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from jaxcl.data import text_files
from jaxcl.data.text_files import TEXT_FILES, read_records, read_rows, read_texts, text_of

TEXTS = ["parse a date", "", 'say "hi", twice', "naïve\u2028café", "tab\tand comma,"]


def write_file(path, texts, field="text"):
    rows = [{"id": number, field: text} for number, text in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        lines = [
            separator.join(("id", field)),
            *(f"{n}{separator}{q}" for n, q in enumerate(quoted)),
        ]
        path.write_text("".join(f"{line}\n" for line in lines))
    return path


def texts_of(path, **options):
    return [text for block in read_texts(path, **options) for text in block]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "parse a date\n"),
        ("a.jsonl", '{"text": "parse a date"}\n'),
        ("a.csv", "text,id\nparse a date,1\n"),
        ("a.tsv", "text\tid\nparse a date\t1\n"),
    ],
)
def test_a_byte_order_mark_is_not_part_of_the_first_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert texts_of(tmp_path / name) == ["parse a date"]


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_every_kind_of_file_gives_its_texts_in_order(tmp_path, kind):
    path = write_file(tmp_path / f"texts{kind}", TEXTS)
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_field_is_chosen_by_name(tmp_path, kind):
    path = write_file(tmp_path / f"texts{kind}", TEXTS, field="body")
    assert texts_of(path, field="body") == TEXTS
    with pytest.raises(ValueError, match="there is no field 'text'; the fields are id, body"):
        texts_of(path)


@pytest.mark.parametrize("kind", TEXT_FILES)
@pytest.mark.parametrize("block_size", [1, 2, 5, 6])
def test_a_block_has_at_most_block_size_texts(tmp_path, kind, block_size):
    path = write_file(tmp_path / f"texts{kind}", TEXTS)
    blocks = list(read_texts(path, block_size=block_size))
    assert [text for block in blocks for text in block] == TEXTS
    assert {len(block) for block in blocks[:-1]} <= {block_size}


def test_long_texts_make_a_short_block(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_CHARACTERS", 20)
    path = write_file(tmp_path / "texts.txt", ["a" * 8] * 7)
    assert list(map(len, read_texts(path))) == [3, 3, 1]


def test_values_of_csv_may_span_lines(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('text,id\r\n"two\nlines",1\r\none,2\r\n')
    assert texts_of(path) == ["two\nlines", "one"]


def test_a_line_without_an_end_is_a_text_and_an_empty_file_has_none(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\r\ntwo")
    assert texts_of(path) == ["one", "two"]
    path.write_text("")
    assert texts_of(path) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\n", "a.txt: line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n', "line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "a" "id"}\n',
            r"line 2 is not JSON \(Expecting ',' delimiter, at character 14\)",
        ),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: text is 5, which is not a text"),
        ("a.jsonl", b'{"text": null}\n', "line 1: text is None, which is not a text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: text is not Unicode"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3 has 1 values, but the header has 2"),
        ("a.csv", b'id,text\n1,"a\n', "a.csv: line 2: unexpected end of data"),
        ("a.csv", b"id,text,text\n1,a,b\n", "line 1: the header has 'text' twice"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: "),
        (
            "a.docx",
            b"",
            r"a\.docx has an unknown suffix; give one of \.txt, \.jsonl, \.csv, \.tsv, \.parquet",
        ),
    ],
)
def test_the_error_for_a_value_that_is_not_a_text_gives_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / name)


def test_the_error_for_a_missing_value_in_parquet_gives_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 2: text is None, which is not a text"):
        texts_of(path)


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_MAX_LINE", 100)
    path = write_file(tmp_path / "a.txt", ["short", "a" * 101])
    with pytest.raises(ValueError, match="line 2 has more than 100 bytes"):
        texts_of(path)


def test_standard_input_has_a_text_per_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert texts_of(None, kind=".txt") == ["one", "two"]


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_files_may_be_compressed_with_gzip(tmp_path, kind):
    plain = write_file(tmp_path / f"texts{kind}", TEXTS)
    packed = tmp_path / f"packed{kind}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert texts_of(packed) == TEXTS


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"not gzip at all"])
def test_a_damaged_compressed_file_is_an_error_with_its_name(tmp_path, damage):
    path = tmp_path / "texts.txt.gz"
    path.write_bytes(damage(gzip.compress(b"one\ntwo\n" * 1000)))
    with pytest.raises(ValueError, match=r"texts\.txt\.gz: "):
        texts_of(path)


def test_records_have_their_line_numbers(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": 2}\n')
    (where, first), (later, second) = read_records(path)
    assert (where, first) == (f"{path}: line 1", {"id": 1, "text": "a"})
    assert text_of(first, "text", where) == "a"
    with pytest.raises(ValueError, match="line 2: there is no field 'text'; the fields are id"):
        text_of(second, "text", later)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".tsv.gz"])
def test_the_rows_of_a_table_include_its_first_and_repeated_values(tmp_path, kind):
    separator = "," if kind == ".csv" else "\t"
    lines = [["a", "a", "5.0"], ['"b\r\nc"', "", "1"]]
    content = "\r\n\r\n".join(separator.join(line) for line in lines).encode("utf-8-sig")
    path = tmp_path / f"rows{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    assert list(read_rows(path)) == [
        (f"{path}: line 1", ["a", "a", "5.0"]),
        (f"{path}: line 4", ["b\nc", "", "1"]),
    ]


def test_the_rows_of_other_files_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is not a table; give a \.csv or \.tsv file"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a\tb\t1\n"He" said\tc\t2\n', "line 2: .* expected after .*; put texts that begin"),
        ('a\tb\t1\n"He said\tc\t2\nd\te\t3\n', "line 3: unexpected end of data; put"),
        ('a\tb\t1\n"He said\tc\t2\nd\te"\tf\t3\n', "line 3: a quoted value has a tab and a"),
    ],
)
def test_a_quotation_mark_that_opens_no_quotes_swallows_no_rows(tmp_path, content, message):
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))
    with pytest.raises(ValueError, match=message):
        list(read_records(path))
    rows = [line.split("\t") for line in content.splitlines()]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    assert [row for _, row in read_rows(path)] == rows
