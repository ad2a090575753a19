"""JSON files that someone else may have written."""

import pytest

from jaxcl.host import files
from jaxcl.host.files import read_json_object


def test_a_json_file_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_CHARACTERS", 10)
    path = tmp_path / "content.json"
    path.write_text('{"a": 100}')
    assert read_json_object(path) == {"a": 100}
    path.write_text('{"a": 1000}')
    with pytest.raises(ValueError, match=r"content\.json is damaged \(it has more than 10 char"):
        read_json_object(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, '{"a": ' * 100_000])
def test_anything_but_an_object_is_an_error(tmp_path, content):
    path = tmp_path / "content.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"content\.json is damaged"):
        read_json_object(path)


def test_another_encoding_is_an_error(tmp_path):
    path = tmp_path / "content.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"content\.json is damaged"):
        read_json_object(path)
