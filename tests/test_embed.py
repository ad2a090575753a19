"""`jaxcl.embed` writes the embedding of each text of a file, in its row."""

import io
import json
import sys

import numpy as np
import pytest
from pyarrow import parquet

from jaxcl import embed
from tests.small_models import DIM, small_model

TEXTS = [f"text {number} " * (number % 7) for number in range(50)]


@pytest.fixture(scope="module")
def model():
    return small_model(TEXTS)


@pytest.fixture
def run(model, monkeypatch, capsys):
    """A function that runs the command and returns (exit code, stderr)."""
    monkeypatch.setattr(embed, "load", lambda path, trust: model)
    monkeypatch.setattr(embed, "keep_compiled", lambda: None)

    def run_command(*argv):
        code = 0
        try:
            embed.main(["--model", "here", *map(str, argv)])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run_command


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


def test_each_text_has_its_row(run, model, lines, tmp_path):
    code, error = run("--input", lines, "--output", tmp_path / "a.npy")
    assert code == 0
    assert f"wrote 50 vectors to {tmp_path / 'a.npy'}" in error
    found = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-6)


def test_blocks_do_not_change_a_vector(model, lines, tmp_path, monkeypatch):
    read = embed.read_texts
    monkeypatch.setattr(embed, "read_texts", lambda *args, **kw: read(*args, **kw, block_size=9))
    assert embed.embed(model, lines, tmp_path / "a.npy") == 50
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), model.encode(TEXTS), atol=1e-6)


def test_the_options_of_the_command_match_encode(run, model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    options = ["--side", "key", "--prompt", "", "--dim", 9, "--quantize", "int8", "--batch-size", 8]
    code, _ = run("--input", path, "--field", "body", "--output", tmp_path / "a.parquet", *options)
    assert code == 0
    wanted = model.encode(TEXTS, side="key", prompt="", dim=9, quantize="int8")
    found = parquet.read_table(tmp_path / "a.parquet")["embedding"].to_pylist()
    assert np.abs(np.array(found) - wanted.astype(int)).max() <= 1  # a value that rounds either way
    assert np.shape(found) == (50, 9)


def test_standard_input_is_embedded_line_by_line(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert run("--input", "-", "--output", tmp_path / "a.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), model.encode(["one", "two"]), atol=1e-6)


def test_an_empty_file_has_no_vectors(model, tmp_path):
    (tmp_path / "a.txt").touch()
    assert embed.embed(model, tmp_path / "a.txt", tmp_path / "a.npy") == 0
    assert np.load(tmp_path / "a.npy").shape == (0, DIM)


def test_an_existing_output_is_kept_without_overwrite(run, lines, tmp_path):
    output = tmp_path / "a.npy"
    output.write_text("dear")
    code, error = run("--input", lines, "--output", output)
    assert (code, output.read_text()) == (1, "dear")
    assert f"error: {output} exists; choose another name, or add --overwrite" in error
    assert run("--input", lines, "--output", output, "--overwrite")[0] == 0
    assert len(np.load(output)) == 50


def test_a_bad_line_leaves_no_output(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    code, error = run("--input", tmp_path / "a.jsonl", "--output", tmp_path / "a.npy")
    assert code == 1
    assert "a.jsonl: line 2: text is 3, which is not a text" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("absent.txt", "a.npy", "there is no file"),
        ("texts.txt", "a.csv", r"a.csv has an unknown suffix; use .npy or .parquet"),
        ("texts.txt", "absent/a.npy", "for the output; create it"),
        ("texts.md", "a.npy", "texts.md has an unknown suffix"),
    ],
)
def test_files_are_checked_before_the_model_is_loaded(
    run, lines, tmp_path, monkeypatch, source, output, message
):
    monkeypatch.setattr(embed, "load", None)
    code, error = run("--input", tmp_path / source, "--output", tmp_path / output)
    assert code == 1
    assert message in error


def test_the_input_is_never_its_own_output(run, tmp_path):
    path = tmp_path / "a.parquet"
    path.touch()
    code, error = run("--input", path, "--output", path, "--overwrite")
    assert code == 1
    assert "is also the input" in error
