"""Demonstration sets of images: TFDS builders whose rows come from installed packages."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from jaxcl.data.prepared_folder import read_prepared, write_prepared
from jaxcl.host.paths import local_path
from jaxcl.host.progress import progress_bar, say

__all__ = ["DemoBuilder", "DemoInfo", "package_folder", "prepare_demo", "split_of"]

FORMAT_VERSION = "1.0.0"
"""Part of the fingerprints; raise it whenever the same packages should give different rows."""

Rows = Sequence[Mapping[str, Any]]


class DemoInfo(NamedTuple):
    """A prepared demonstration set.

    Attributes:
      directory: a prepared TFDS data set, for `open_pairs` or `tfds.builder_from_directory`.
      fingerprint: a sha256 that identifies the rows.
      split_sizes: number of rows per split.
    """

    directory: Path
    fingerprint: str
    split_sizes: dict[str, int]


class DemoBuilder(  # type: ignore[call-arg] # an argument of TFDS
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A TFDS builder that writes the given rows in order. Subclasses only set its name."""

    VERSION = tfds.core.Version(FORMAT_VERSION)
    RELEASE_NOTES = {FORMAT_VERSION: "The first version."}  # noqa: RUF012 - as TFDS requires

    def __init__(
        self,
        *,
        splits: Mapping[str, Rows],
        features: Mapping[str, Any],
        data_dir: str | Path,
        on_progress: Callable[[int], None],
    ) -> None:
        self._splits, self._features, self._on_progress = splits, features, on_progress
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(dict(self._features)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

    def _generate_examples(self, rows: Rows) -> Any:
        for number, row in enumerate(rows):
            self._on_progress(1)
            yield number, dict(row)


def prepare_demo(
    builder: type[DemoBuilder],
    data_dir: str | Path,
    *,
    made_from: Sequence[Any],
    features: Mapping[str, Any],
    make_rows: Callable[[], Mapping[str, Rows]],
) -> DemoInfo:
    """Prepare a demonstration set, or find it if an earlier call has prepared it.

    Args:
      builder: the class of the builder; its name becomes the name of the folder.
      data_dir: the rows go to `<data_dir>/<name>/<12 hex digits>`.
      made_from: everything that determines the rows, in JSON types.
      features: the features of a row.
      make_rows: returns split -> rows; empty splits are left out.

    Raises:
      ValueError: if `data_dir` cannot be written.
    """
    content = json.dumps([FORMAT_VERSION, *made_from])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    directory = local_path(data_dir).absolute() / builder.name / fingerprint[:12]
    description = read_prepared(directory, fingerprint)
    if description is None:
        splits = {name: rows for name, rows in make_rows().items() if rows}
        sizes = {name: len(rows) for name, rows in splits.items()}
        say(f"{builder.name}: " + ", ".join(f"{size:,} rows of {n}" for n, size in sizes.items()))
        description = {"fingerprint": fingerprint, "split_sizes": sizes}
        with progress_bar(f"writing {builder.name}", sum(sizes.values())) as advance:
            write_prepared(
                directory,
                description,
                lambda folder: builder(
                    splits=splits, features=features, data_dir=folder, on_progress=advance
                ),
            )
    return DemoInfo(directory, fingerprint, dict(description["split_sizes"]))


def split_of(identity: str, *, seed: int, validation_fraction: float, test_fraction: float) -> str:
    """The split of a group, by a hash of its name: `"test"`, `"validation"` or `"train"`.

    Args:
      identity: a name of the group that does not depend on the other groups.
      seed: the seed of the hash; different seeds hold out different groups.
      validation_fraction, test_fraction: the shares of the groups that are held out.

    Example:
      >>> split_of("A", seed=0, validation_fraction=0.0, test_fraction=1.0)
      'test'
    """
    for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name}_fraction={fraction} must be from 0 to 1")
    digest = hashlib.sha256(json.dumps([seed, identity]).encode()).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48
    if share < test_fraction:
        return "test"
    return "validation" if share < test_fraction + validation_fraction else "train"


def package_folder(package: str, *, needed_by: str) -> Path:
    """Find the folder of an installed package without importing the package.

    Raises:
      ValueError: if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{needed_by} needs the package {package}, which is not installed; run pip install "
            '"jaxcl[images]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))
