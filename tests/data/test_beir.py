"""BEIR folders: relevance labels in several formats, and an error or a count for gaps."""

import gzip
import json

import numpy as np
import pytest

from jaxcl.data.beir import is_beir, qrels_file, read_beir

CORPUS = [
    {"_id": "d1", "title": "Sockets", "text": "open a socket"},
    {"_id": "d2", "title": "", "text": "parse a date"},
    {"_id": "d3", "text": "read a line"},
    {"_id": "q3", "text": "write a line"},
]
QUERIES = [
    {"_id": "q1", "text": "socket"},
    {"_id": "q2", "text": "date"},
    {"_id": "q3", "text": "write a line"},
    {"_id": "q4", "text": "unjudged"},
]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t2\nq1\td1\t1\nq1\td3\t3\nq3\td3\t1\nq2\td1\t0\n"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", CORPUS)
    write_lines(tmp_path / "queries.jsonl", QUERIES)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(QRELS)
    return tmp_path


def pairs_of(found):
    return [
        (found.query_ids[query], found.corpus.ids[row] if row >= 0 else None, int(grade))
        for query, row, grade in zip(found.queries, found.documents, found.grades, strict=True)
    ]


def test_a_folder_is_read(folder):
    found = read_beir(folder)
    assert found.query_ids == ["q1", "q2", "q3"]
    assert found.query_texts == ["socket", "date", "write a line"]
    assert pairs_of(found) == [("q1", "d1", 1), ("q1", "d3", 3), ("q2", "d2", 2), ("q3", "d3", 1)]
    assert (np.diff(found.queries) >= 0).all()
    assert found.corpus.read([0, 1]) == ["Sockets open a socket", "parse a date"]
    assert found.own_documents.tolist() == [-1, -1, 3]
    assert found.left_out == {
        "queries_without_judgements": 1,
        "queries_without_relevant": 0,
        "unknown_queries": 0,
        "unknown_documents": 0,
        "own_documents": 1,
    }


def as_jsonl(qrels):
    lines = [line.split("\t") for line in qrels.splitlines()[1:]]
    return "".join(
        json.dumps({"query-id": query, "corpus-id": document, "score": int(score)}) + "\n"
        for query, document, score in lines
    )


def as_trec(qrels):
    lines = [line.split("\t") for line in qrels.splitlines()[1:]]
    return "".join(f"{query} 0 {document} {score}\n" for query, document, score in lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.tsv", QRELS.partition("\n")[2]),
        ("test.tsv", "\ufeff" + QRELS.replace("\n", "\r\n") + "\r\n"),
        ("test.tsv", QRELS.replace("2\n", "2.0\n")),
        ("test.tsv", as_trec(QRELS)),
        ("test.jsonl", as_jsonl(QRELS)),
        ("test.jsonl", as_jsonl(QRELS).replace('"score"', '"relevance"')),
    ],
    ids=["no header", "from Windows", "decimals", "TREC", "JSON lines", "relevance"],
)
def test_labels_in_other_formats_are_equivalent(folder, name, content):
    expected = pairs_of(read_beir(folder))
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels" / name).write_bytes(content.encode())
    assert pairs_of(read_beir(folder)) == expected


def test_compressed_files_mean_the_same(folder):
    expected = pairs_of(read_beir(folder))
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    assert is_beir(folder)
    assert pairs_of(read_beir(folder)) == expected


def test_json_lines_without_a_score_are_relevant_and_ids_may_be_integers(folder):
    write_lines(folder / "corpus.jsonl", [{"_id": 7, "text": "seven"}])
    qrels = folder / "qrels" / "train.jsonl"
    write_lines(qrels, [{"query-id": "q1", "corpus-id": 7}])
    assert pairs_of(read_beir(qrels)) == [("q1", "7", 1)]


def test_the_default_labels_are_test_then_dev_then_the_only_file(folder):
    qrels = folder / "qrels"
    (qrels / "dev.tsv").write_text("q1\td2\t1\n")
    (qrels / "train.tsv").write_text("q1\td3\t1\n")
    assert len(pairs_of(read_beir(folder))) == 4
    assert qrels_file(folder) == qrels / "test.tsv"
    assert qrels_file(folder, "train") == qrels / "train.tsv"
    with pytest.raises(
        ValueError, match=r"no file of judgements of the split 'valid'; .* dev\.tsv"
    ):
        qrels_file(folder, "valid")
    assert pairs_of(read_beir(qrels / "train.tsv")) == [("q1", "d3", 1)]
    (qrels / "test.tsv").unlink()
    assert pairs_of(read_beir(folder)) == [("q1", "d2", 1)]
    (qrels / "dev.tsv").unlink()
    assert pairs_of(read_beir(folder)) == [("q1", "d3", 1)]
    (qrels / "other.tsv").write_text("q1\td3\t1\n")
    with pytest.raises(ValueError, match=r"the path of one of other\.tsv, train\.tsv"):
        read_beir(folder)


def test_one_split_in_two_formats_is_an_error(folder):
    (folder / "qrels" / "test.jsonl").write_text(as_jsonl(QRELS))
    with pytest.raises(ValueError, match=r"the path of one of test\.jsonl, test\.tsv"):
        read_beir(folder)


def test_gaps_in_the_labels_are_counted(folder):
    (folder / "qrels" / "test.tsv").write_text(
        "q1\td1\t1\nq1\tgone\t2\nq1\tgone too\t0\nq2\td1\t0\nq9\td1\t1\nq3\td1\t-1\n"
    )
    found = read_beir(folder)
    assert pairs_of(found) == [("q1", "d1", 1), ("q1", None, 2)]
    assert found.query_ids == ["q1", "q2", "q3"]
    assert found.left_out == {
        "queries_without_judgements": 1,
        "queries_without_relevant": 2,
        "unknown_queries": 1,
        "unknown_documents": 1,
        "own_documents": 1,
    }


def test_a_document_with_the_id_of_its_query_stays_if_it_is_relevant(folder):
    (folder / "qrels" / "test.tsv").write_text("q3\tq3\t1\n")
    found = read_beir(folder)
    assert found.own_documents.tolist() == [-1]
    assert found.left_out["own_documents"] == 0


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("", r"test\.tsv has no judgements"),
        ("query-id\tcorpus-id\tscore\n", r"test\.tsv has no judgements"),
        ("q1\td1\n", r"test\.tsv: line 1 has 2 columns"),
        ("q1\td1\t1\nq1\n", r"test\.tsv: line 2 has 1 columns"),
        ("q1\td1\tgood\n", r"line 1: the relevance 'good' is not an integer"),
        ("q1\td1\t0.5\n", r"line 1: the relevance '0\.5' is not an integer"),
        ("q1\td1\tnan\n", r"line 1: the relevance 'nan' is not an integer"),
        ("q1\td1\tinf\n", r"line 1: the relevance 'inf' is not an integer"),
        ("q1\td1\t1\nq1\td1\t1\n", r"line 2: document 'd1' is judged twice for 'q1'"),
        ("x1\td1\t1\n", r"judgements for 1 query, but .* first id there is 'x1', .* like 'q1'"),
        ("q1\tx1\t1\nq1\tx2\t1\n", r"none of the documents in .* is in the corpus"),
    ],
)
def test_wrong_labels_are_an_error(folder, qrels, message):
    (folder / "qrels" / "test.tsv").write_text(qrels)
    with pytest.raises(ValueError, match=message):
        read_beir(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query-id": "q1", "score": 1}, "line 1 has none of the fields corpus-id, corpus_id"),
        ({"query-id": ["q1"], "corpus-id": "d1"}, r"the ids \[\['q1'\], 'd1'\] are not texts"),
        ({"query-id": "q1", "corpus-id": "d1", "score": None}, "the relevance None is not"),
        ({"query-id": "q1", "corpus-id": "d1", "score": True}, "the relevance True is not"),
        ({"query-id": "q1", "corpus-id": "d1", "score": 10**400}, "the relevance 1000.* is not"),
    ],
)
def test_wrong_labels_in_json_are_an_error(folder, record, message):
    write_lines(folder / "qrels" / "dev.jsonl", [record])
    with pytest.raises(ValueError, match=message):
        read_beir(folder / "qrels" / "dev.jsonl")


def test_bytes_that_are_not_text_are_an_error_with_the_line(folder):
    (folder / "qrels" / "test.tsv").write_bytes(b"q1\td1\t1\nq1\t\xff\t1\n")
    with pytest.raises(ValueError, match=r"test\.tsv: line 2 is not UTF-8"):
        read_beir(folder)


def test_incomplete_folders_are_an_error(folder):
    assert is_beir(folder)
    assert is_beir(folder / "qrels" / "test.tsv")
    (folder / "queries.jsonl").rename(folder / "questions.jsonl")
    with pytest.raises(ValueError, match=r"has no queries\.jsonl or queries\.jsonl\.gz"):
        read_beir(folder)
    (folder / "questions.jsonl").rename(folder / "queries.jsonl")
    (folder / "corpus.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has both corpus\.jsonl and corpus\.jsonl\.gz"):
        read_beir(folder)
    (folder / "qrels" / "test.tsv").rename(folder / "judged.tsv")
    with pytest.raises(ValueError, match=r"has no file of judgements; write .*test\.tsv"):
        read_beir(folder)
    (folder / "qrels").rmdir()
    with pytest.raises(ValueError, match=r"has no folder qrels/"):
        qrels_file(folder)
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        (folder / name).unlink()
    assert not is_beir(folder)
    assert not is_beir(folder / "judged.tsv")


def test_two_documents_with_one_id_are_an_error(folder):
    write_lines(folder / "corpus.jsonl", [*CORPUS, CORPUS[0]])
    with pytest.raises(ValueError, match=r"line 5: the id 'd1' is also that of document 1"):
        read_beir(folder)


@pytest.fixture
def without_qrels(folder):
    (folder / "qrels" / "test.tsv").unlink()
    (folder / "qrels").rmdir()
    return folder


def test_pairs_of_texts_need_no_qrels(without_qrels):
    write_lines(without_qrels / "corpus.jsonl", [{"text": text} for text in ("a", "b", "a", "c")])
    write_lines(
        without_qrels / "queries.jsonl",
        [
            {"query": "one", "positive": "b"},
            {"query": "two", "positive": "a"},
            {"query": "three", "positive": "elsewhere"},
        ],
    )
    found = read_beir(without_qrels)
    assert found.query_texts == ["one", "two", "three"]
    assert pairs_of(found) == [("0", "1", 1), ("1", "0", 1), ("1", "2", 1), ("2", None, 1)]
    assert found.own_documents.tolist() == [-1, -1, -1]  # ids are line numbers
    assert found.left_out["unknown_documents"] == 1


def test_the_query_is_the_text_of_a_query_if_there_are_other_texts(folder):
    record = {"_id": "q1", "document": "Sockets", "text": "Sockets", "query": "socket"}
    write_lines(folder / "queries.jsonl", [record])
    assert read_beir(folder).query_texts == ["socket"]


def test_positives_are_ids_or_texts(without_qrels):
    titled = "Sockets open a socket"
    for positives in (["d1", "d3"], [titled, "read a line"], ["d1", "read a line", titled]):
        record = {"_id": "q1", "text": "socket", "positives": positives}
        write_lines(without_qrels / "queries.jsonl", [record])
        assert pairs_of(read_beir(without_qrels)) == [("q1", "d1", 1), ("q1", "d3", 1)]


def test_qrels_are_used_if_there_are_both(folder):
    write_lines(folder / "queries.jsonl", [record | {"positive": "d1"} for record in QUERIES])
    assert pairs_of(read_beir(folder))[1] == ("q1", "d3", 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"line 1: there is no field positives or positive, and no folder .*qrels"),
        ({"positives": [1]}, r"line 1: positives is \[1\]; give ids or texts"),
        ({"positive": None}, r"line 1: positive is \[None\]; give ids or texts"),
        ({"positives": []}, r"none of the documents in .*queries\.jsonl is in the corpus"),
        ({"positive": "elsewhere"}, r"none of the documents in .*queries\.jsonl is in the corpus"),
    ],
)
def test_wrong_positives_are_an_error(without_qrels, record, message):
    write_lines(without_qrels / "queries.jsonl", [{"_id": "q1", "text": "socket", **record}])
    with pytest.raises(ValueError, match=message):
        read_beir(without_qrels)
