"""Models of the Hugging Face Hub, by the optional package `huggingface_hub`."""

import os
import re
from pathlib import Path

from jaxcl.host.paths import AnyPath, as_path

__all__ = ["local_or_hub"]

_MODEL_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*", "NOTICE*"]
"""The files that are downloaded: neither pickles nor code."""


def local_or_hub(given: str | os.PathLike[str]) -> AnyPath:
    """The path of a folder, or of the local copy of a model on the Hugging Face Hub.

    Args:
      given: a folder; or, if there is none of this name, a model's id on the Hub, such as
        `"sentence-transformers/all-MiniLM-L6-v2"`. A model that has been downloaded before is taken
        from the cache, without asking for a newer version.

    Raises:
      ValueError: if `huggingface_hub` is not installed, or the Hub has no such model or no
        safetensors of it.
      ConnectionError: if the model is not in the cache, and the Hub cannot be reached.
    """
    path = as_path(given)
    model = os.fspath(given)
    if path.is_dir() or not _MODEL_ID.fullmatch(model):
        return path
    try:
        import huggingface_hub  # noqa: F401 - asked for before its use
    except ImportError as error:
        raise ValueError(
            f"{model} is no folder; to take a model of this name from the Hugging Face Hub, "
            "pip install 'jaxcl[hub]'"
        ) from error
    return _cached(model) or _download(model)


def _cached(model: str) -> Path | None:
    """The model in the cache, unless a part of it is missing."""
    try:
        folder = _snapshot(model, local_files_only=True)
    except (OSError, ValueError):  # the package has named its error differently over time
        return None
    return folder if _has_weights(folder) else None


def _download(model: str) -> Path:
    from huggingface_hub.utils import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        folder = _snapshot(model, local_files_only=False)
    except (GatedRepoError, HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{model} is no folder, and the Hugging Face Hub does not give a model of this name "
            f"({_first_line(error)}); check the name, or log in with `hf auth login`"
        ) from error
    except OSError as error:
        raise ConnectionError(
            f"{model} is no folder, and cannot be downloaded from the Hugging Face Hub "
            f"({_first_line(error)}); give the folder of a model, or check the network"
        ) from error
    if not _has_weights(folder):
        raise ValueError(
            f"{folder}, the copy of {model} from the Hugging Face Hub, has no safetensors; check "
            "the network or, if the Hub has only pickles, load them where you trust them, save "
            "them as transformers' save_pretrained does, and give that folder"
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
