"""Evaluation sets are opened by the kind of their content."""

import numpy as np
import pytest

from jaxcl.evaluation import sets
from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.evaluation.sets import Kind, open_set


class Lengths:
    """A set that needs no data: the mean length of two vectors."""

    kind = "lengths"
    fingerprint = "0"

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
def test_a_path_of_no_kind_is_an_error_that_lists_what_is_expected(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a\.txt is no .* set; give a folder; or a \.len file"):
        open_set(tmp_path / "a.txt")


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no evaluation set"):
        open_set(tmp_path / "absent")
