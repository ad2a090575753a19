"""Find and open prepared TFDS data sets without importing anything that they name.

`tfds.builder_from_files` would do this in one call, but it reads a data set before the data set can
be checked, and imports TFDS's data set modules to find the default configuration.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.tfds_features import DATASET_INFO_FILE, check_features
from jaxcl.host.files import read_json_object
from jaxcl.host.paths import as_path
from jaxcl.settings.file_kinds import HUGGING_FACE_FILES

__all__ = ["find_directory", "full_name", "open_builder", "open_records"]

_NAME = re.compile(
    r"(?P<name>[a-zA-Z]\w*)(/(?P<config>[\w+-][\w+.-]*))?"
    r"(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?"
)
_RANDOM_ACCESS = ("array_record", "parquet")
"""File formats whose rows can be read in any order, in order of preference."""


def find_directory(name: str | Path, data_dir: str | Path | None) -> Any:
    """Find the directory of a prepared data set, without reading it.

    Args:
      name: the directory of one version, or a TFDS name: `NAME`, `NAME/CONFIG`, `NAME:VERSION` or
        `NAME/CONFIG:VERSION`. Without a version, the newest one is taken.
      data_dir: the folder where names are looked up; None means TFDS's own directories.

    Returns:
      An `etils.epath.Path`.

    Raises:
      ValueError: if the data set does not exist, or exists more than once.
    """
    from etils import epath
    from tensorflow_datasets.core.utils import file_utils

    directory = epath.Path(as_path(name))
    if any((directory / file).exists() for file in HUGGING_FACE_FILES):
        raise ValueError(
            f"{directory} holds a data set of Hugging Face's datasets; set data.name={directory} "
            "in a config, or use open_pair_files in a program"
        )
    if (directory / DATASET_INFO_FILE).exists():
        return directory
    parts = _NAME.fullmatch(str(name))
    is_path = directory.is_absolute() or str(name).startswith((".", "~"))
    if is_path or (parts is None and directory.is_dir()):
        raise ValueError(
            f"{directory} holds no prepared data set (it has no dataset_info.json); give the "
            "directory of one version, a TFDS name together with data_dir, or a file of pairs "
            "(.jsonl, .csv, .tsv, .parquet)"
        )
    if parts is None:
        raise ValueError(
            f"{str(name)!r} is neither a directory nor the name of a TFDS data set, nor a file of "
            "pairs (.jsonl, .csv, .tsv, .parquet); give NAME, NAME/CONFIG, NAME:VERSION or "
            "NAME/CONFIG:VERSION"
        )
    where = None if data_dir is None else epath.Path(data_dir).expanduser()
    roots = [epath.Path(root) for root in file_utils.list_data_dirs(where)]
    versions = [_version_directory(root, **parts.groupdict()) for root in roots]
    directories = [version for version in versions if version]
    if len(directories) > 1:
        raise ValueError(
            f"the data set {name!r} is prepared in {' and in '.join(map(str, directories))}; set "
            "data_dir, or give the directory"
        )
    if directories:
        return directories[0]
    prepared = [] if where is None else _prepared_in(where)
    raise ValueError(
        f"the data set {name!r} is not prepared; looked in {[str(root) for root in roots]}"
        + (f" (the folder {directory} holds none)" if directory.is_dir() else "")
        + (f", where there is {', '.join(prepared)}" if prepared else "")
        + ". Set data_dir to its directory, run your own script that prepares it, or prepare "
        f"a data set of TFDS: {_prepare_command(str(name), data_dir)}"
    )


def open_builder(directory: Any) -> Any:
    """Open a prepared data set, in a file format with random access if possible.

    Args:
      directory: an `etils.epath.Path` from `find_directory`.

    Raises:
      ValueError: if a feature is of a class other than TFDS's own, or the files are damaged.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    check_features(directory)
    try:
        builder = tfds.builder_from_directory(directory)
        available = {known.value for known in builder.info.available_file_formats()}
        best = next((known for known in _RANDOM_ACCESS if known in available), None)
        if best is not None:
            # Otherwise TFDS would read files of this format, but its splits would name other files.
            builder.info.set_file_format(best, override=True, override_if_initialized=True)
        return builder
    except (
        ParseError,
        AssertionError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{directory} cannot be read as a prepared data set ({reason}); prepare it again"
        ) from error


class Records:
    """The undecoded records of a split."""

    def __init__(self, source: Any, directory: str) -> None:
        self._source, self._directory = source, directory

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: list[int]) -> list[Any]:
        """The records of these rows.

        Raises:
          ValueError: if a file is damaged.
        """
        try:
            return list(self._source.__getitems__(rows))
        except RuntimeError as error:  # from array_record
            raise ValueError(
                f"a file in {self._directory} is damaged ({error}); prepare the data set again"
            ) from error


def open_records(builder: Any, split: str, instructions: Sequence[Any]) -> Records:
    """Open the undecoded records of a split.

    Args:
      builder: a builder from `open_builder`.
      split: the name of a split in `builder.info.splits`, or a part of it.
      instructions: the split's file instructions.

    Raises:
      ValueError: if the file format has no random access or cannot read parts of a split, or a file
        has a different number of rows than `dataset_info.json` states.
    """
    import tensorflow_datasets as tfds

    file_format = builder.info.file_format.value
    if file_format == "parquet":
        _check_whole_files(builder, split, instructions)
    try:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split, deserialize_method=raw)
        if file_format == "array_record":
            _check_array_records(builder, instructions)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} is prepared as {file_format}, whose rows "
            f"cannot be read in any order; {_prepare_again(builder)}"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"reading a data set that is prepared as {file_format} needs a package that is not "
            f"installed ({error}). Install it (array_record has no wheel for Windows), or use "
            "InMemoryPairs."
        ) from error
    stated = sum(instruction.take for instruction in instructions)
    if len(records) != stated:
        raise ValueError(
            f"the split {split!r} of {builder.data_path} has {stated:,} rows according to "
            f"its {DATASET_INFO_FILE}, but its files hold {len(records):,}; prepare it again"
        )
    return Records(records, str(builder.data_path))


def full_name(builder: Any) -> str:
    """The name of a data set, with its version and its configuration, if it has one."""
    config = f"/{builder.info.config_name}" if builder.info.config_name else ""
    return f"{builder.name}{config}:{builder.info.version}"


def _check_whole_files(builder: Any, split: str, instructions: Sequence[Any]) -> None:
    """Reject parts of files, because TFDS reads Parquet files whole, whatever the split says."""
    files = [instruction.filename for instruction in instructions]
    are_whole = all(part.take == part.examples_in_shard for part in instructions)
    if not are_whole or len(set(files)) < len(files):
        raise ValueError(
            f"the split {split!r} of {builder.data_path} cannot be read: it is prepared as "
            f"parquet, and TFDS reads Parquet files whole. Name a whole split, one of "
            f"{sorted(builder.info.splits)}, or {_prepare_again(builder)}"
        )


def _check_array_records(builder: Any, instructions: Sequence[Any]) -> None:
    """Compare each file's number of rows with `dataset_info.json`, which TFDS does not check."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path, stated in {part.filename: part.examples_in_shard for part in instructions}.items():
        try:
            reader = ArrayRecordReader(path)
            num_rows = reader.num_records()
            reader.close()  # fails if the file's index is damaged
        except RuntimeError as error:
            raise ValueError(f"{path} is damaged ({error}); prepare the data set again") from error
        if num_rows != stated:
            raise ValueError(
                f"{path} has {num_rows:,} rows, but {stated:,} according to the "
                f"{DATASET_INFO_FILE} next to it; prepare the data set again"
            )


def _version_directory(root: Any, name: str, config: str | None, version: str | None) -> Any:
    """The directory of the newest matching version, or None."""
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core.utils.version import list_all_versions

    data_set = root / naming.camelcase_to_snakecase(name)
    folders = [data_set / config] if config else [data_set, *_default_config(data_set)]
    for folder in folders:
        for candidate in reversed(list_all_versions(folder)):
            directory = folder / str(candidate)
            matches = version is None or candidate.match(version)
            if matches and (directory / DATASET_INFO_FILE).exists():
                return directory
    return None


def _default_config(data_set: Any) -> list[Any]:
    """The folder of the default configuration, if there is one."""
    metadata = data_set / ".config" / "metadata.json"
    if not metadata.exists():
        return []
    name = read_json_object(metadata).get("default_config_name")
    is_name = isinstance(name, str) and re.fullmatch(r"[\w+-][\w+.-]*", name)
    return [data_set / name] if is_name else []


def _prepared_in(directory: Any) -> list[str]:
    """The names of the data sets in a directory."""
    plain = directory.glob(f"*/*/{DATASET_INFO_FILE}")
    configured = directory.glob(f"*/*/*/{DATASET_INFO_FILE}")
    return sorted(
        f"{'/'.join(path.parent.parent.relative_to(directory).parts)}:{path.parent.name}"
        for paths in (plain, configured)
        for path in paths
    )


def _prepare_again(builder: Any) -> str:
    return (
        "prepare it as array_record in another data_dir: "
        f"{_prepare_command(full_name(builder), '/another/directory')}"
    )


def _prepare_command(name: str, data_dir: str | Path | None) -> str:
    # Users copy the command into a shell, and the names may come from someone else.
    name = name if _NAME.fullmatch(name) else "NAME:VERSION"
    safe = data_dir is None or re.fullmatch(r"[\w./:~+ -]+", str(data_dir))
    where = "" if data_dir is None else f"data_dir='{data_dir if safe else 'DIRECTORY'}', "
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', {where}file_format='array_record').download_and_prepare()\""
    )
