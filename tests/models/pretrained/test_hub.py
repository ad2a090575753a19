"""Models of the Hugging Face Hub, with a stub instead of `huggingface_hub`."""

import sys
from fnmatch import fnmatch
from types import ModuleType

import pytest

from jaxcl.models.pretrained.folder import read_pretrained
from jaxcl.models.pretrained.hub import local_or_hub

MODEL = "org/tiny-model.v2"


class NotFound(OSError):
    """Stands for the package's error for an unknown model."""


@pytest.fixture
def hub(monkeypatch):
    """A stub that records calls and answers each from `hub.answers`: a folder or an error."""
    package, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")
    package.calls, package.answers = [], []

    def snapshot_download(model, *, allow_patterns, local_files_only):
        for name in ("pytorch_model.bin", "modeling.py", "tokenizer.py", "model.onnx"):
            assert not any(fnmatch(name, pattern) for pattern in allow_patterns)
        package.calls.append((model, local_files_only))
        answer = package.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    package.snapshot_download = snapshot_download
    utils.GatedRepoError = utils.HFValidationError = utils.RepositoryNotFoundError = NotFound
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
    return package


@pytest.fixture
def snapshot(tmp_path):
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_model_in_the_cache_needs_no_network(hub, snapshot):
    hub.answers = [snapshot]
    assert local_or_hub(MODEL) == snapshot
    assert hub.calls == [(MODEL, True)]


def test_a_model_is_downloaded_once(hub, snapshot):
    hub.answers = [FileNotFoundError("not in the cache"), snapshot]
    assert local_or_hub(MODEL) == snapshot
    assert hub.calls == [(MODEL, True), (MODEL, False)]


def test_a_model_with_only_its_config_cached_is_downloaded(hub, snapshot, tmp_path):
    hub.answers = [tmp_path / "empty", snapshot]
    assert local_or_hub(MODEL) == snapshot


def test_a_folder_of_the_same_name_takes_precedence(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir(parents=True)
    assert str(local_or_hub(MODEL)) == MODEL
    assert hub.calls == []


@pytest.mark.parametrize("path", ["name", "a/b/c", "./a", "/org/name", "~/name", "org/na me"])
def test_names_that_are_not_model_ids_are_paths(hub, path):
    with pytest.raises(FileNotFoundError, match="is not a folder; give the folder"):
        read_pretrained(path)
    assert hub.calls == []


def test_the_error_without_huggingface_hub_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"org/tiny-model\.v2 is not a folder.*'jaxcl\[hub\]'"):
        read_pretrained(MODEL)


def test_the_error_for_an_unknown_model_names_it(hub):
    hub.answers = [FileNotFoundError(), NotFound("404 Client Error.\nmore")]
    with pytest.raises(ValueError, match=r"does not give .*\(404 Client Error\.\); check the name"):
        local_or_hub(MODEL)


def test_without_a_network_the_error_names_the_cause(hub):
    hub.answers = [FileNotFoundError(), FileNotFoundError("offline")]
    with pytest.raises(ConnectionError, match=r"cannot be downloaded .*\(offline\); give the fold"):
        local_or_hub(MODEL)


def test_a_model_without_safetensors_is_refused(hub, tmp_path):
    hub.answers = [FileNotFoundError(), tmp_path]
    with pytest.raises(
        ValueError, match=f"{tmp_path}, the copy of {MODEL} from .* has no safetensors; check the"
    ):
        local_or_hub(MODEL)
