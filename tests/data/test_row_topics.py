"""Topics by row number, and errors for wrong files."""

import numpy as np
import pytest

from jaxcl.data.row_topics import read_topics

TOPIC = np.array([3, 0, 3])


def written(path, **arrays):
    np.savez(path / "topics.npz", **arrays)
    return path / "topics.npz"


def test_topics_are_read(tmp_path):
    found = read_topics(written(tmp_path, topic=TOPIC, source=np.array("rows")), num_rows=3)
    assert found.topic.tolist() == [3, 0, 3]
    assert found.topic.dtype == np.int32
    other = read_topics(written(tmp_path, topic=TOPIC + 1), num_rows=3, source="any")
    assert other.fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"topics": TOPIC}, "has no topic; it has topics"),
        ({"topic": TOPIC[:2]}, r"use integers of shape \[3\]"),
        ({"topic": TOPIC.astype(float)}, "topic is float64"),
        ({"topic": TOPIC + np.array([0, 2**31, 0])}, "topic has 2147483648 in row 1; .* int32"),
        ({"topic": TOPIC - np.array([0, 0, 2**31 + 4])}, "topic has .* in row 2; .* int32"),
        ({"topic": np.array([0, 2**63, 1], np.uint64)}, "topic has .* in row 1; .* int32"),
        ({"topic": np.array(["a", "b", "c"])}, "use integers"),
        ({"topic": TOPIC, "source": np.array([1, 2])}, r"source is int64\[2\]; use a text"),
        ({"topic": TOPIC, "source": np.array("x" * 10_000)}, "use a text"),
        ({"topic": TOPIC, "source": np.array("others")}, r"from other rows \(others\)"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_problem(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_topics(written(tmp_path, **arrays), num_rows=3, source="rows")
    assert str(caught.value).startswith(f"data.topics={tmp_path / 'topics.npz'}")


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_a_missing_or_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "topics.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.topics=.*topics\.npz cannot be read"):
        read_topics(path, num_rows=3)
