"""Prepare a TFDS data set in a folder, whole or not at all, with a description of its content."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from jaxcl.data.sources import DESCRIPTION_FILE
from jaxcl.host.files import read_json_object
from jaxcl.host.staging import put_in_place, staging_folder

__all__ = ["read_prepared", "write_prepared"]


def write_prepared(
    directory: Path, description: Mapping[str, Any], builder: Callable[[Path], Any]
) -> None:
    """Prepare a data set in a staging folder, and rename the result when it is complete.

    Args:
      directory: the folder, in `data_dir/NAME/`. It is replaced if its files are damaged.
      description: facts about the rows in JSON types, including their `"fingerprint"`.
      builder: data_dir -> the TFDS builder.

    Raises:
      ValueError: if the folder cannot be written.
    """
    try:
        with staging_folder(directory) as folder:
            with _quiet_tfds():
                prepared = builder(folder)
                prepared.download_and_prepare()
            written = Path(prepared.data_path)
            _write_description(written, description)
            exists = os.path.lexists(directory)
            damaged = exists and read_prepared(directory, description["fingerprint"]) is None
            put_in_place(written, directory, replace=damaged)
    except OSError as error:
        data_dir = str(directory.parent.parent)
        raise ValueError(
            f"data_dir={data_dir!r} cannot be written ({error}); set data_dir to another directory"
        ) from error


def _write_description(directory: Path, description: Mapping[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    content = json.dumps({**description, "files": files}, indent=1) + "\n"
    (directory / DESCRIPTION_FILE).write_text(content)


def read_prepared(directory: Path, fingerprint: str) -> dict[str, Any] | None:
    """Read the description of a folder.

    Returns:
      The description; `None` unless it has this fingerprint, and all files have the sizes that it
      states.
    """
    try:
        values = read_json_object(directory / DESCRIPTION_FILE)
        sizes = values.pop("files")
        if any((directory / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return values if values["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silence TFDS's progress bars, prints and logs, and restore their global settings at exit."""
    from tensorflow_datasets.core.utils import tqdm_utils

    bars, verbosity = tqdm_utils._active, logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(bars)
        logging.set_verbosity(verbosity)
