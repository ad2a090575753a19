"""Documents with ids, from files as BEIR, search engines and people write them."""

import json

import pytest

from jaxcl.data.documents import read_documents


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_title_and_a_text_are_one_document(tmp_path):
    path = write_lines(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "a", "title": "Dates", "text": "parse a date"},
            {"_id": "b", "title": "", "text": "open a file"},
            {"_id": "c", "text": "no title"},
        ],
    )
    documents = read_documents(path)
    assert documents.ids == ["a", "b", "c"]
    assert documents.read([2, 0, 1]) == ["no title", "Dates parse a date", "open a file"]
    assert len(documents) == 3


def test_integers_are_ids_and_lines_without_ids_are_numbered(tmp_path):
    assert read_documents(write_lines(tmp_path / "a.jsonl", [{"id": 7, "passage": "x"}])).ids == [
        "7"
    ]
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    documents = read_documents(tmp_path / "b.txt")
    assert documents.ids == ["0", "1"]
    assert documents.read([1]) == ["two"]


def test_fields_are_chosen_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,number,text,summary\n1,x,long,short\n")
    documents = read_documents(path, id_field="number", text_field="summary")
    assert (documents.ids, documents.read([0])) == (["x"], ["short"])


def test_the_fingerprint_changes_with_texts_ids_and_order(tmp_path):
    records = [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]
    variants = [
        records,
        records[::-1],
        [{"id": "a", "text": "x"}, {"id": "b", "text": "z"}],
        [{"id": "a", "text": "x"}, {"id": "c", "text": "y"}],
    ]
    fingerprints = [
        read_documents(write_lines(tmp_path / f"{number}.jsonl", variant)).fingerprint
        for number, variant in enumerate(variants)
    ]
    assert len(set(fingerprints)) == len(variants)
    again = read_documents(write_lines(tmp_path / "again.jsonl", records))
    assert again.fingerprint == fingerprints[0]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no documents"),
        (
            [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}],
            "line 2: the id 'a' is also that of document 1",
        ),
        ([{"id": "a", "text": "x"}, {"text": "y"}], "line 2: there is no field 'id'"),
        ([{"id": "a", "text": "x"}, {"id": "", "text": "y"}], "line 2: id is empty"),
        ([{"id": True, "text": "x"}], "line 1: id is True, which is not a text"),
        ([{"id": "a", "text": 3}], "line 1: text is 3, which is not a text"),
        ([{"id": "a", "words": "x"}], "line 1: none of the fields id, words is known"),
        ([{"id": "a", "text": "x", "title": 3}], "line 1: title is 3, which is not a text"),
    ],
)
def test_the_error_for_a_damaged_document_gives_its_line(tmp_path, records, message):
    path = write_lines(tmp_path / "corpus.jsonl", records)
    with pytest.raises(ValueError, match=message):
        read_documents(path)


def test_a_row_past_the_end_is_an_error(tmp_path):
    documents = read_documents(write_lines(tmp_path / "a.jsonl", [{"id": "a", "text": "x"}]))
    with pytest.raises(IndexError):
        documents.read([1])
