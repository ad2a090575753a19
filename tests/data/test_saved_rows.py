"""Rows from a program are saved to a file that is named by their content."""

import json

import numpy as np
import pytest

from jaxcl.data.saved_rows import save_rows


def test_equal_rows_have_one_file(tmp_path):
    rows = [{"query": "ä", "key": ["b", "c"], "score": np.float32(0.5), "n": np.arange(2)}]
    path = save_rows(rows, tmp_path)
    assert save_rows(iter(rows), tmp_path) == path
    assert save_rows([*rows, *rows], tmp_path) != path
    assert json.loads(path.read_text()) == rows[0] | {"score": 0.5, "n": [0, 1]}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", "b"), "row 1 is a tuple; give dicts"),
        ({"query": {1, 2}}, r"row 1 cannot be written as JSON \(it holds a set\)"),
    ],
)
def test_values_that_json_cannot_hold_are_an_error(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        save_rows(iter([{"query": "a"}, row]), tmp_path)
    assert list(tmp_path.iterdir()) == []
