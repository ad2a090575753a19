"""Models from the Hugging Face Hub, with the optional package `huggingface_hub`."""

import os
import re
from pathlib import Path

from jaxcl.host.paths import AnyPath, as_path

__all__ = ["local_or_hub"]

_MODEL_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*", "NOTICE*"]
"""The files to download, without pickles and code."""


def local_or_hub(given: str | os.PathLike[str]) -> AnyPath:
    """The path of a folder, or of the local copy of a model on the Hugging Face Hub.

    Args:
      given: a folder, or the id of a model on the Hub, such as
        `"sentence-transformers/all-MiniLM-L6-v2"`. An existing folder takes precedence. A model in
        the Hub's local cache is used without a check for a newer version.

    Raises:
      ValueError: if `huggingface_hub` is not installed, the Hub has no model with this id, or the
        model has no safetensors.
      ConnectionError: if the model is not in the cache, and the Hub cannot be reached.
    """
    path = as_path(given)
    model = os.fspath(given)
    if path.is_dir() or not _MODEL_ID.fullmatch(model):
        return path
    try:
        import huggingface_hub  # noqa: F401 - checks that it is installed
    except ImportError as error:
        raise ValueError(
            f"{model} is not a folder; to download a model of this name from the Hugging Face Hub, "
            "pip install 'jaxcl[hub]'"
        ) from error
    return _cached(model) or _download(model)


def _cached(model: str) -> Path | None:
    """The cached copy of a model; `None` if there is none, or if it has no weights."""
    try:
        folder = _snapshot(model, local_files_only=True)
    except (OSError, ValueError):  # the class of this error differs between versions of the package
        return None
    return folder if _has_weights(folder) else None


def _download(model: str) -> Path:
    from huggingface_hub.utils import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        folder = _snapshot(model, local_files_only=False)
    except (GatedRepoError, HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{model} is not a folder, and the Hugging Face Hub does not give access to this model "
            f"({_first_line(error)}); check the name, or log in with `hf auth login`"
        ) from error
    except OSError as error:
        raise ConnectionError(
            f"{model} is not a folder, and cannot be downloaded from the Hugging Face Hub "
            f"({_first_line(error)}); give the folder of a model, or check the network"
        ) from error
    if not _has_weights(folder):
        raise ValueError(
            f"{folder}, the copy of {model} from the Hugging Face Hub, has no safetensors; check "
            "the network. If the Hub has only pickles that you trust, load them with transformers, "
            "save them with save_pretrained, and give that folder"
        )
    return folder


def _snapshot(model: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model, allow_patterns=_PATTERNS, local_files_only=local_files_only)
    )


def _has_weights(folder: Path) -> bool:
    return any(folder.rglob("*.safetensors"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
