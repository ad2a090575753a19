"""The kind of an evaluation set is detected from its content."""

import re
from pathlib import Path

import numpy as np
import pytest

from jaxcl.evaluation import sets
from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.evaluation.sets import KINDS, Kind, open_set

FOLDER = Path(sets.__file__).parent


class Lengths:
    """A set that needs no data: the mean length of two vectors."""

    kind = "lengths"
    fingerprint = "0"
    metrics = ("length",)
    inputs = ("query",)
    description = "two texts"

    def evaluate(self, encode):
        return {"length": float(np.linalg.norm(encode("query", ["a", "b"]), axis=1).mean())}


@pytest.fixture
def kinds(monkeypatch):
    of_name = {
        "other": Kind("a folder", lambda path: path.is_dir(), lambda path: pytest.fail("opened")),
        "lengths": Kind("a .len file", lambda path: path.suffix == ".len", lambda path: Lengths()),
    }
    monkeypatch.setattr(sets, "KINDS", of_name)


@pytest.mark.usefixtures("kinds")
def test_a_path_is_opened_by_the_kind_that_recognises_it(tmp_path):
    (tmp_path / "a.len").touch()
    found = open_set(tmp_path / "a.len")
    assert isinstance(found, EvaluationSet)
    assert found.evaluate(lambda side, texts: np.float32([[3, 4], [0, 1]])) == {
        "length": (5 + 1) / 2
    }


@pytest.mark.usefixtures("kinds")
def test_a_path_of_no_kind_is_an_error_that_lists_the_expected_ones(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        ValueError, match=r"a\.txt is not an .* set; give a folder; or a \.len file"
    ):
        open_set(tmp_path / "a.txt")


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_set(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.csv", "a,b,5.0\nc,d,1\n", "sts"),
        ("a.tsv", "sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\t1\n", "sts"),
        ("a.csv", "a,b,0\nc,d,1\n", "pairs"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "label": 1}\n' * 2, "error"),
        (
            "a.jsonl",
            '{"text1": "a", "text2": "b", "label": true}\n'
            '{"text1": "a", "text2": "c", "label": false}',
            "pairs",
        ),
    ],
)
def test_labels_and_scores_tell_pairs_from_semantic_similarity(tmp_path, name, content, kind):
    path = tmp_path / name
    path.write_text(content)
    if kind == "error":
        with pytest.raises(ValueError, match=r"a\.jsonl: the labels of 2 pairs are 1; pair"):
            open_set(path)
    else:
        assert open_set(path).kind == kind


def test_a_given_kind_opens_scores_that_look_like_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b,0\nc,d,1\n")
    assert open_set(path, kind="sts").kind == "sts"
    path.write_text("a,b,0\nc,d,1\ne,f,0.5\n")
    with pytest.raises(ValueError, match=r"a\.csv: the labels of 3 pairs are 0, 0\.5, 1; pair"):
        open_set(path, kind="pairs")
    with pytest.raises(ValueError, match=r"kind='st' is unknown; use .*pairs or sts"):
        open_set(path, kind="st")
    path.write_text("a,b,2\nc,d,2\n")
    with pytest.raises(ValueError, match=r"a\.csv: 2 pairs with scores from 2 to 2 have no"):
        open_set(path)


def test_a_file_of_other_records_names_what_it_lacks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a"}')
    with pytest.raises(ValueError, match="line 1: none of the fields query is known to hold two"):
        open_set(path)


def test_the_readme_lists_all_kinds_and_modules():
    names = re.findall(r"^\| ([^|]*`[^|]*) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    listed = {name for row in names for name in re.findall(r"`([^`]+)`", row)}
    modules = {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert listed == set(KINDS) | modules
