"""Each kind of file gives the same rows, and the line numbers of rows that cannot be read."""

import bz2
import gzip
import lzma

import pyarrow
import pytest
from pyarrow import ipc, parquet

from jaxcl.data import file_readers
from jaxcl.data.file_readers import FileRow, place_of, read_fields, read_rows

ROWS = [{"query": "ä?", "key": 'b, "c"\td'}, {"query": "e", "key": "f\ng"}]


def write_arrow(path, rows, **options):
    table = pyarrow.Table.from_pylist(rows, **options)
    with ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=1)


def content_of(kind):
    if kind == "jsonl":
        return b'\xef\xbb\xbf{"query": "\xc3\xa4?", "key": "b, \\"c\\"\\td"}\r\n\n' + (
            b'{"key": "f\\ng", "query": "e"}'
        )
    text = 'query;key\nä?;"b, ""c""\td"\n\ne;"f\ng"\n'
    return text.replace(";", "," if kind == "csv" else "\t").encode()


KINDS = ("jsonl", "csv", "tsv", "parquet", "arrow")


@pytest.fixture
def written(tmp_path):
    """Write the rows to a file of a kind."""

    def write(kind):
        path = tmp_path / f"pairs.{kind}"
        if kind == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)
        elif kind == "arrow":
            write_arrow(path, ROWS)
        else:
            path.write_bytes(content_of(kind))
        return path

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_give_the_same_rows(written, kind):
    path = written(kind)
    assert sorted(read_fields(path)) == ["key", "query"]
    rows = list(read_rows(path, ["query", "key"]))
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.problem for row in rows] == [None, None]
    last = {"jsonl": "line 3", "csv": "line 4", "tsv": "line 4"}.get(kind, "row 2")
    assert place_of(path, rows[1].number) == f"pairs.{kind} {last}"


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files_give_the_same_rows(tmp_path, compression):
    path = tmp_path / f"pairs.csv.{compression}"
    path.write_bytes(COMPRESS[compression](content_of("csv")))
    assert [dict(row.fields) for row in read_rows(path, [])] == ROWS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_that_was_cut_is_damaged(tmp_path, compression):
    path = tmp_path / f"pairs.jsonl.{compression}"
    content = COMPRESS[compression](b"".join(b'{"query": "%d"}\n' % i for i in range(999)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"pairs.jsonl.{compression} is damaged \(.*write it"):
        list(read_rows(path, []))


def test_wrong_lines_of_json_are_returned_with_their_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(file_readers, "_MAX_LINE", 40)
    path = tmp_path / "pairs.jsonl"
    long = b'{"query": "' + b"x" * 99 + b'"}\n'
    path.write_bytes(b'{"a": 1}\n[1]\n{"a": \n{"a": "\xff"}\n' + long + b'{"a": 2}\n' + b"[" * 40)
    rows = list(read_rows(path, []))
    assert [row.number for row in rows] == list(range(1, 8))
    problems = [row.problem or "" for row in rows]
    wanted = ("", "not a JSON object", "not JSON (", "not UTF-8", "more than 40 bytes", "", "not J")
    for problem, part in zip(problems, wanted, strict=True):
        assert part in problem
        assert bool(part) == bool(problem)
    assert rows[5].fields == {"a": 2}


def test_wrong_rows_of_a_table_are_returned_with_their_problem(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'query,key\na,b,c\n"a"b,c\na\n\xff,d\n"open,\nx\n')
    rows = list(read_rows(path, []))
    assert [row.number for row in rows] == [2, 3, 4, 5, 6]
    assert "3 values, but the header has 2" in rows[0].problem
    assert "cannot be read" in rows[1].problem
    assert "1 values, but the header has 2" in rows[2].problem
    assert rows[3] == FileRow(5, {"query": "\udcff", "key": "d"})
    assert "cannot be read (unexpected end of data)" in rows[4].problem


def test_a_quotation_mark_that_opens_no_quotes_swallows_no_rows(tmp_path):
    content = b'query\tkey\n"He said\tc\nd"\tf\ng\th\n'
    (tmp_path / "pairs.tsv").write_bytes(content)
    wrong, right = read_rows(tmp_path / "pairs.tsv", [])
    assert wrong.number == 2
    assert "a quoted value has a tab and a line break" in wrong.problem
    assert right == FileRow(4, {"query": "g", "key": "h"})
    (tmp_path / "pairs.csv").write_bytes(content.replace(b"\t", b","))
    (row, _) = read_rows(tmp_path / "pairs.csv", [])
    assert row.fields == {"query": "He said,c\nd", "key": "f"}  # as the CSV standard says


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_that_is_not_utf8_is_a_problem_of_its_row_alone(tmp_path, kind):
    texts = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"query": texts})
    path = tmp_path / f"pairs.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    rows = list(read_rows(path, ["query"]))
    assert [row.problem for row in rows] == [None, "a text of the row is not UTF-8", None]
    assert rows[2].fields == {"query": "c"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"query,key,query\n", "a.csv has two columns named 'query'"),
        ("a.csv", b'"query"x,key\n', r"a.csv: the header cannot be read \("),
        ("a.csv", b"\xff\xfeq\x00u\x00", "a.csv: the header is not UTF-8"),
        (
            "a.json",
            b' [\n{"query": "a"}\n]',
            "a.json: the file is one JSON array; write one object",
        ),
        (
            "a.json",
            b'\n{\n"query": "a"\n}',
            r"a.json: no row can be read; line 2: the line is not JSON \(Expecting property name "
            r"enclosed in double quotes, at character \d\)",
        ),
        (
            "a.jsonl",
            b'{"query": "a" "key": "b"}\n',
            r"line 1: the line is not JSON \(Expecting ',' delimiter, at character 15\)",
        ),
        ("a.jsonl", b"\xff\xfe{\x00", "a.jsonl: no row can be read; line 1: the line is not UTF-8"),
        ("a.parquet", b"no parquet", "a.parquet: .*magic bytes"),
        ("a.arrow", b"no arrow at all", "a.arrow: "),
        ("a.txt", b"", "a.txt has an unknown suffix"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_fields(path)


def test_an_empty_file_has_no_fields(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).touch()
        assert read_fields(tmp_path / name) == []
