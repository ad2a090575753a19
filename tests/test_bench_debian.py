"""Descriptions of Debian packages: parsed, joined, and split without overlap."""

import json

import pytest

from jaxcl.bench.debian import Description, descriptions, write_folder
from jaxcl.data.beir import read_beir

PACKAGES = """Package: viewer
Source: pictures (1.2)
Description: fast image viewer
Description-md5: 01

Package: viewer-data
Source: pictures
Description: fast image
Description-md5: 02

Package: editor
Description: small text editor
Description-md5: 03

Package: untranslated
Description: some short text
Description-md5: 04
"""
LONG = "Shows the pictures of a folder one after another"
TRANSLATIONS = f"""Package: viewer
Description-md5: 01
Description-en: fast image viewer
 {LONG[:20]}
 {LONG[20:]}
 .
 It is fast.

Package: editor
Description-md5: 03
Description-en: small text editor
 Too short.
"""


def test_short_and_long_descriptions_are_joined():
    whole = f"{LONG[:20]} {LONG[20:]} It is fast.".split()
    assert descriptions(PACKAGES, TRANSLATIONS) == [
        Description("viewer", "pictures", "fast image viewer", " ".join(whole))
    ]


@pytest.fixture
def found():
    """Packages of 300 sources; some share their descriptions with others."""
    return [
        Description(
            package=f"p{source}-{part}",
            source=f"s{source}",
            short=f"short description {source % 250}" if part else f"own words {source}",
            long=f"long description {source % 280} {part}",
        )
        for source in range(300)
        for part in range(2)
    ]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_pairs_are_not_trained_on(tmp_path, found):
    sizes = write_folder(tmp_path, found)
    pairs = read_lines(tmp_path / "pairs.jsonl")
    assert sizes["pairs"] == len(pairs)
    assert 400 < len(pairs) < 600
    trained = [{pair[side] for pair in pairs} for side in ("query", "positive")]
    sets = [
        read_beir(tmp_path / "evaluation" / "qrels" / f"{name}.tsv") for name in ("dev", "test")
    ]
    assert not set(sets[0].query_ids) & set(sets[1].query_ids)
    for one in sets:
        assert len(one.query_ids) > 10
        assert not trained[0] & set(one.query_texts)
        assert not trained[1] & set(one.corpus.read(one.documents))
        assert not any(
            count for name, count in one.left_out.items() if name != "queries_without_judgements"
        )


def test_every_package_with_the_query_as_its_description_is_relevant(tmp_path, found):
    write_folder(tmp_path, found)
    one = read_beir(tmp_path / "evaluation")
    longs = {}
    for package in found:
        longs.setdefault(package.short, set()).add(package.long)
    for number, text in enumerate(one.query_texts):
        assert set(one.corpus.read(one.documents[one.queries == number])) == longs[text]
    assert len(one.corpus) == 280 * 2


def test_a_new_package_moves_no_other(tmp_path, found):
    first, second = tmp_path / "first", tmp_path / "second"
    write_folder(first, found)
    new = Description("new", "new", "the newest package", "long description of the newest package")
    write_folder(second, [new, *found])
    for name in ("pairs.jsonl", "evaluation/queries.jsonl"):
        old = (first / name).read_text().splitlines()
        assert set(old) <= set((second / name).read_text().splitlines())


def test_too_few_packages_are_an_error(tmp_path, found):
    with pytest.raises(ValueError, match="2 descriptions give only"):
        write_folder(tmp_path, found[:2])
