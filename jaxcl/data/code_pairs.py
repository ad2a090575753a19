"""Code search pairs from the installed Python packages: a docstring and its function.

`open_pairs(prepare_code_pairs("~/data").directory, "train", group_field="group")` opens them.

The query is the first paragraph of a docstring, and the key is the source of its function without
the docstring. Whole packages are held out as the test split (an unseen domain), and a share of the
other packages' files as the validation split.
"""

import difflib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jaxcl.data import python_functions
from jaxcl.data.prepared_folder import read_prepared, write_prepared
from jaxcl.data.python_functions import FileScan, PythonFunction, SourceRoot
from jaxcl.host.paths import local_path
from jaxcl.host.progress import progress_bar, say

__all__ = ["CodePairs", "CodePairsInfo", "prepare_code_pairs", "split_functions"]

FORMAT_VERSION = "1.0.0"
"""Part of the fingerprint; raise it whenever the same files should give different rows."""

_COPIED = ("package", "module", "qualified_name", "name")
_FILES_WORTH_PROCESSES = 1000


class CodePairsInfo(NamedTuple):
    """The result of `prepare_code_pairs`.

    Attributes:
      directory: a prepared TFDS data set, for `open_pairs` or `tfds.builder_from_directory`.
      fingerprint: a sha256 that identifies the rows, independent of where packages are installed.
      split_sizes: number of pairs per split; splits without pairs are left out.
      packages: the packages, sorted; a pair's group is the index of its package.
      num_files: number of Python files searched.
      num_duplicates: number of functions dropped as duplicates, by code or by docstring.
      skipped: number of files that could not be used, by reason.
    """

    directory: Path
    fingerprint: str
    split_sizes: dict[str, int]
    packages: tuple[str, ...]
    num_files: int
    num_duplicates: int
    skipped: dict[str, int]


class CodePairs(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of `prepare_code_pairs`, which writes one pair per function, in order."""

    VERSION = tfds.core.Version(FORMAT_VERSION)
    RELEASE_NOTES = {FORMAT_VERSION: "The first version."}  # noqa: RUF012 - as TFDS requires

    def __init__(
        self,
        *,
        splits: Mapping[str, Sequence[PythonFunction]],
        packages: Sequence[str],
        data_dir: str | Path,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._splits = splits
        self._groups = {package: group for group, package in enumerate(packages)}
        self._on_progress = on_progress
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("query", "key", *_COPIED, "file")
        features = {name: tfds.features.Text() for name in names}
        features |= {"line": np.int32, "group": np.int32}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Docstrings and their functions, from installed Python packages.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("query", "key"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

    def _generate_examples(
        self, functions: Sequence[PythonFunction]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, function in enumerate(functions):
            self._on_progress(1)
            texts = {name: getattr(function, name) for name in _COPIED}
            sides = {"query": function.docstring_paragraph, "key": function.source}
            where = {"file": function.path, "line": function.line}
            yield row, {**texts, **sides, **where, "group": self._groups[function.package]}


def prepare_code_pairs(
    data_dir: str | Path,
    *,
    roots: Sequence[SourceRoot] | None = None,
    test_packages: Sequence[str] = ("stdlib",),
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    max_pairs: int | None = None,
) -> CodePairsInfo:
    """Prepare the code search pairs, or find them if nothing has changed since an earlier call.

    Every call hashes the packages' files. The directory is named after these hashes, the options
    and the locations of the packages, so that a changed environment never gets the old rows. The
    directory appears only when it is complete, so a killed preparation leaves nothing that looks
    usable.

    Args:
      data_dir: the pairs go to `<data_dir>/code_pairs/<12 hex digits>`.
      roots: the directories to search; None means the running interpreter's standard library (the
        package `stdlib`) and its site-packages.
      test_packages: packages that are held out as a whole. If a function in them has duplicates in
        other packages, the duplicates are dropped.
      validation_fraction: the share of the other packages' files that is held out.
      split_seed: the seed for drawing the held-out files and, with `max_pairs`, the pairs.
      max_pairs: the maximum number of pairs, drawn from all splits together; None keeps all pairs.

    Raises:
      ValueError: if an option is wrong, a test package is not installed, a required split has no
        pairs, or data_dir cannot be written.
      RuntimeError: if files change during the preparation.
    """
    _check_options(validation_fraction, max_pairs)
    roots = python_functions.installed_roots() if roots is None else tuple(roots)
    options = [sorted(set(test_packages)), validation_fraction, split_seed, max_pairs]
    with progress_bar("hashing Python files", None) as advance:
        scan = python_functions.scan_files(roots, on_progress=advance)
    _check_test_packages(test_packages, scan)
    # A newer Python may parse files that an older one skips.
    content = [FORMAT_VERSION, sys.version_info[:2], scan.fingerprint, *options]
    fingerprint = _sha256(content)
    name = _sha256([fingerprint, [os.path.abspath(root.path) for root in roots]])[:12]
    directory = local_path(data_dir).absolute() / "code_pairs" / name
    if (info := _read_info(directory, fingerprint)) is not None:
        return info
    say(
        f"collecting the documented functions of {len(scan.files):,} Python files in "
        f"{', '.join(str(root.path) for root in roots)}; they are kept in {directory}"
    )
    functions, skipped = _parse(scan)
    splits, num_duplicates = split_functions(
        functions,
        test_packages=test_packages,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        max_pairs=max_pairs,
    )
    info = CodePairsInfo(
        directory=directory,
        fingerprint=fingerprint,
        split_sizes={split: len(rows) for split, rows in splits.items()},
        packages=tuple(sorted({row.package for rows in splits.values() for row in rows})),
        num_files=len(scan.files),
        num_duplicates=num_duplicates,
        skipped=dict(sorted(skipped.items())),
    )
    say(_summary(info))
    return _write(info, splits)


def split_functions(
    functions: Sequence[PythonFunction],
    *,
    test_packages: Sequence[str],
    validation_fraction: float,
    split_seed: int,
    max_pairs: int | None = None,
) -> tuple[dict[str, list[PythonFunction]], int]:
    """Drop duplicates across all packages, then split: test by package, validation by file.

    Returns:
      The non-empty splits, each sorted by package, file and line, and the number of duplicates
      dropped.

    Raises:
      ValueError: if there are no functions, or none are left for `train`, or for a `test` split
        that `test_packages` asks for.
    """
    if not functions:
        raise ValueError("no documented Python function was found; check `roots`")
    pairs = _without_duplicates(functions, first_packages=test_packages)
    num_duplicates = len(functions) - len(pairs)
    if max_pairs is not None:
        draw = {row: _uniform(split_seed, _identity(row), row.qualified_name) for row in pairs}
        pairs = sorted(pairs, key=lambda row: (draw[row], row))[:max_pairs]
    splits: dict[str, list[PythonFunction]] = {"train": [], "validation": [], "test": []}
    for row in sorted(pairs, key=_order):
        if row.package in test_packages:
            splits["test"].append(row)
        elif _uniform(split_seed, _identity(row)) < validation_fraction:
            splits["validation"].append(row)
        else:
            splits["train"].append(row)
    for split, wanted in (("train", True), ("test", bool(test_packages))):
        if wanted and not splits[split]:
            raise ValueError(
                f"none of the {len(pairs)} pairs is left for {split}, with test_packages="
                f"{tuple(test_packages)}; install or hold out other packages, or keep more pairs"
            )
    return {split: rows for split, rows in splits.items() if rows}, num_duplicates


def _without_duplicates(
    functions: Sequence[PythonFunction], *, first_packages: Sequence[str]
) -> list[PythonFunction]:
    """Keep the first function per code (ignoring white space) and per docstring (ignoring case)."""
    kept, codes, queries = [], set(), set()
    for row in sorted(functions, key=lambda row: (row.package not in first_packages, _order(row))):
        code, query = "".join(row.source.split()), row.docstring_paragraph.lower()
        if code not in codes and query not in queries:
            kept.append(row)
            codes.add(code)
            queries.add(query)
    return kept


def _order(row: PythonFunction) -> tuple[str, str, int, str]:
    return row.package, row.file, row.line, row.qualified_name


def _identity(row: PythonFunction) -> str:
    return f"{row.package}:{row.file}"


def _uniform(*parts: object) -> float:
    """A number in [0, 1) that depends only on the parts."""
    return int(_sha256(list(parts))[:13], 16) / 16**13


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_options(validation_fraction: float, max_pairs: int | None) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must be at least 0 and below 1"
        )
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs} must be positive, or None for all pairs")


def _check_test_packages(test_packages: Sequence[str], scan: FileScan) -> None:
    if isinstance(test_packages, str):
        raise ValueError(f"test_packages={test_packages!r} must be a sequence of names")
    if not scan.files:
        raise ValueError("no documented Python function was found; check `roots`")
    known = sorted({file.package for file in scan.files})
    for package in test_packages:
        if package not in known:
            similar = difflib.get_close_matches(package, known)
            advice = f"did you mean {similar}?" if similar else f"the packages are {known}"
            raise ValueError(f"the test package {package!r} is not installed; {advice}")


def _summary(info: CodePairsInfo) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in info.skipped.items() if count)
    return (
        f"{sum(info.split_sizes.values()):,} pairs from {info.num_files:,} files of "
        f"{len(info.packages)} packages; {info.num_duplicates:,} duplicates dropped; files "
        f"skipped: {reasons or 'none'}"
    )


def _parse(scan: FileScan) -> tuple[list[PythonFunction], Counter[str]]:
    num_processes = 1 if len(scan.files) < _FILES_WORTH_PROCESSES else min(os.cpu_count() or 1, 8)
    with progress_bar("parsing Python files", len(scan.files)) as advance:
        functions, skipped = python_functions.parse_functions(
            scan.files, num_processes=num_processes, on_progress=advance
        )
    if skipped[python_functions.CHANGED]:
        raise RuntimeError(
            "Python files changed while they were read, perhaps by an installation; run again"
        )
    return functions, scan.skipped + skipped


def _write(info: CodePairsInfo, splits: Mapping[str, Sequence[PythonFunction]]) -> CodePairsInfo:
    """Write into a staging folder, and rename the result when it is complete."""
    values = info._asdict()
    del values["directory"]
    with progress_bar("writing pairs", sum(info.split_sizes.values())) as advance:
        write_prepared(
            info.directory,
            values,
            lambda folder: CodePairs(
                splits=splits, packages=info.packages, data_dir=folder, on_progress=advance
            ),
        )
    return info


def _read_info(directory: Path, fingerprint: str) -> CodePairsInfo | None:
    """Read a description; None unless it exists and all files have the sizes that it states."""
    try:
        values = read_prepared(directory, fingerprint)
        if values is None:
            return None
        values["packages"] = tuple(values["packages"])
        return CodePairsInfo(directory=directory, **values)
    except (KeyError, TypeError):
        return None
