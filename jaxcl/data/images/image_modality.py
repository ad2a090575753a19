"""The modality of images: uint8 arrays of one size."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcl.data.images.checked_images import check_images, usable_images
from jaxcl.data.images.decoder_probe import decoder_fingerprint, decoder_name
from jaxcl.data.images.decoding import MAX_IMAGE_BYTES, image_rule
from jaxcl.data.images.image_table import ImageTable, decode_images, image_spec
from jaxcl.data.modality import Reader, Split
from jaxcl.data.row_labels import equal_rows, split_labels
from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table
from jaxcl.host.files import read_json_object, read_regular, write_whole
from jaxcl.host.paths import AnyPath, local_path
from jaxcl.settings.data_sections import DataSettings
from jaxcl.typing import Array, Int, Integer, PyTree

__all__ = ["Image"]

_FOLDER = "images"
_PATCH_PIXELS = 16 * 16


class Image:
    """Images as `{"image": uint8[s, s, 3]}`. An encoder's first argument is the size `s`."""

    files: tuple[str, ...] = ("images.json",)

    def usable(self, data: DataSettings, source: PairSource, split: Split) -> PairSource:
        """The rows whose images can be decoded; the first call decodes all images."""
        checked = check_images(
            source,
            split.sides,
            image_rule(data),
            role=split.role,
            directory=split.data_dir / _FOLDER,
        )
        return usable_images(source, checked, role=split.role, bad=data.images.bad)

    def prepare(
        self, data: DataSettings, train: PairSource, sides: tuple[str, ...], workdir: AnyPath
    ) -> None:
        """Write the versions of Pillow and its libraries to the workdir."""
        (name,) = self.files
        if not (workdir / name).exists():
            description = {"decoder": decoder_name(), "fingerprint": decoder_fingerprint()}
            write_whole(workdir / name, json.dumps(description, indent=2) + "\n")

    def open_table(
        self, data: DataSettings, source: PairSource, split: Split, workdir: AnyPath
    ) -> Table:
        """The split's images, which are decoded when a batch needs them."""
        rule = image_rule(data)
        checked = check_images(
            source, split.sides, rule, role=split.role, directory=split.data_dir / _FOLDER
        )
        numbers = [equal_rows(checked.digests[side]) for side in split.sides]
        labels = split_labels(source, checked.group, numbers)
        return ImageTable(
            source,
            rule,
            group=labels["group"],
            text=labels["text"],
            both_equal=_both_equal([checked.digests[side] for side in split.sides]),
        )

    def reader(self, data: DataSettings, side: str, workdir: AnyPath) -> Reader:
        """A function from image files (as bytes or paths), PIL images or uint8 arrays to inputs."""
        rule = image_rule(data)

        def read(values: Sequence[Any]) -> PyTree:
            contents = [
                read_regular(local_path(value), limit=MAX_IMAGE_BYTES)
                if isinstance(value, str | Path)
                else value
                for value in values
            ]
            return {"image": decode_images(contents, rule)}

        return read

    def fingerprint(self, workdir: AnyPath) -> str:
        """A hash of some decoded images, which differs if Pillow decodes them differently."""
        return decoder_fingerprint()

    def changed(self, workdir: AnyPath) -> str:
        """A message that names the version of Pillow with which the run was trained."""
        (name,) = self.files
        try:
            trained_with = str(read_json_object(workdir / name)["decoder"])
        except (OSError, ValueError, KeyError):
            trained_with = "another version of Pillow"
        return (
            f"{decoder_name()} decodes images differently from {trained_with}, with which the run "
            f"in {workdir} was trained; install that version"
        )

    def encoder_argument(self, data: DataSettings, side: str) -> int:
        """The height and width of the images, in pixels."""
        return data.images.size

    def spec(self, data: DataSettings, side: str) -> PyTree:
        """`{"image": uint8[s, s, 3]}`."""
        return image_spec(image_rule(data))

    def random_inputs(
        self, data: DataSettings, side: str, rng: np.random.Generator, num_rows: int
    ) -> PyTree:
        """Images of random pixels."""
        spec = image_spec(image_rule(data))["image"]
        return {"image": rng.integers(0, 256, (num_rows, *spec.shape), np.uint8)}

    def length(self, data: DataSettings, side: str) -> int:
        """The number of patches of 16 × 16 pixels in one image."""
        return _patches(data.images.size, data.images.size)

    def count(self, inputs: PyTree) -> Int[Array, ""]:
        """The number of patches of 16 × 16 pixels in a batch of images."""
        rows, height, width = inputs["image"].shape[:3]
        return jnp.int32(rows * _patches(height, width))


def _both_equal(digests: Sequence[Integer[np.ndarray, "n 2"]]) -> bool:
    return len(digests) == 2 and np.array_equal(digests[0], digests[1])


def _patches(height: int, width: int) -> int:
    return math.ceil(height * width / _PATCH_PIXELS)
