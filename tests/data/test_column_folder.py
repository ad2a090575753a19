"""Columns are computed once, and recomputed if their folder is damaged."""

import json

import numpy as np
import pytest

from jaxcl.data.column_folder import cached_columns

COLUMNS = {"offsets": np.array([0, 2, 5]), "scores": np.array([0.5, -1.0], np.float32)}
MADE_FROM = {"format": 1, "source": "rows"}


@pytest.fixture
def kept(tmp_path):
    """A function that reads the columns, and a list of the computations that it made."""
    computed = []

    def read(made_from=MADE_FROM):
        def compute():
            computed.append(made_from)
            return COLUMNS

        return cached_columns(tmp_path / "columns", made_from, compute, what="some columns")

    return read, computed


def assert_columns(found):
    assert found.keys() == COLUMNS.keys()
    for name, column in COLUMNS.items():
        assert found[name].dtype == column.dtype
        assert found[name].tolist() == column.tolist()


def test_columns_are_computed_once(kept):
    read, computed = kept
    for _ in range(3):
        assert_columns(read())
    assert len(computed) == 1


@pytest.mark.parametrize("file", ["offsets.npy", "scores.npy", "columns.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_damaged_columns_are_recomputed(kept, tmp_path, capsys, file, damage):
    read, computed = kept
    read()
    path = tmp_path / "columns" / file
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert_columns(read())
    assert len(computed) == 2
    assert "some columns are computed again" in capsys.readouterr().err
    assert_columns(read())
    assert len(computed) == 2


def test_columns_of_other_data_are_not_used(kept, tmp_path):
    read, computed = kept
    read()
    assert_columns(read({**MADE_FROM, "source": "other rows"}))
    assert len(computed) == 2


def test_later_damage_does_not_reach_columns_in_memory(kept, tmp_path):
    read, _ = kept
    found = read()
    for file in (tmp_path / "columns").glob("*.npy"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert_columns(found)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        cached_columns(tmp_path / "file" / "columns", MADE_FROM, lambda: COLUMNS, what="columns")


def test_the_index_names_what_the_columns_were_made_from(kept, tmp_path):
    read, _ = kept
    read()
    index = json.loads((tmp_path / "columns" / "columns.json").read_text())
    assert index["content"]["made_from"] == MADE_FROM
