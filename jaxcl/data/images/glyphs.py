"""Pictures of characters with their Unicode names: the demonstration set `glyphs`.

`open_pairs(prepare_glyphs("~/data").directory, "train", query_field="image", key_field="caption")`
opens them. The pictures are drawn with Pillow in the 12 DejaVu faces that ship with matplotlib.

Some characters look alike, such as the Latin A, the Greek Alpha and the Cyrillic A. Characters that
share a bitmap in any face form a *group*. A group is never divided between splits, and masking by
group keeps equal pictures from being negatives of each other.
"""

import hashlib
import io
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from jaxcl.data.images.decoding import pillow
from jaxcl.data.images.demo_sets import (
    DemoBuilder,
    DemoInfo,
    package_folder,
    prepare_demo,
    split_of,
)
from jaxcl.typing import UInt8

__all__ = ["FACES", "Glyph", "Glyphs", "draw_glyphs", "group_characters", "prepare_glyphs"]

FACES = tuple(
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-Bold{slanted}", f"-{slanted}")
)
"""The names of the font files, without their suffix."""

SIZE = 32
"""The height and width of a picture, in pixels."""
_POINTS = 24
_FACE_PAIR = ("DejaVuSans", "DejaVuSansMono-BoldOblique")
"""The faces of the split `test_faces`: an easy one, and one that looks very different."""


class Glyph(NamedTuple):
    """A picture of a character: white on black, with grey levels at the edges."""

    character: str
    face: str
    pixels: UInt8[np.ndarray, "s s"]


class Glyphs(DemoBuilder):
    """Characters in the 12 DejaVu faces, as pictures of 32 × 32 pixels, with Unicode names."""


def prepare_glyphs(
    data_dir: str | Path,
    *,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    characters: Collection[str] | None = None,
) -> DemoInfo:
    """Prepare the glyphs, or find them if an earlier call has prepared them.

    A row has an `image` (a PNG file), its `caption` (the Unicode name in lower case), `other` (the
    same character in a random other face, or the same picture if there is no other face), the
    `character`, the `face`, the face of the other picture (`other_face`) and the `group`.

    | split | rows |
    |---|---|
    | `train`, `validation`, `test` | all pictures of the characters; whole groups are held out |
    | `test_sans` | the pictures of `test` in DejaVu Sans, one for each character |
    | `test_faces` | as `test_sans`, if DejaVu Sans Mono Bold Oblique has the character (`other`) |

    Args:
      data_dir: the pictures go to `<data_dir>/glyphs/<12 hex digits>`.
      validation_fraction, test_fraction: the shares of the groups that are held out.
      split_seed: the seed of the splits and of the other faces.
      characters: the characters to draw; `None` draws all characters of each face.

    Raises:
      ValueError: if Pillow, matplotlib or fontTools is not installed, an option is wrong, or
        `data_dir` cannot be written.
    """
    fonts = _font_files()
    digests = {face: hashlib.sha256(path.read_bytes()).hexdigest() for face, path in fonts.items()}
    options: list[Any] = [validation_fraction, test_fraction, split_seed]
    options.append(None if characters is None else sorted(characters))
    shares = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    split_of("", seed=split_seed, **shares)  # checks the shares

    def make_rows() -> dict[str, list[dict[str, Any]]]:
        glyphs = draw_glyphs(fonts, characters=characters)
        groups = group_characters(glyphs)
        first = {group: character for character, group in sorted(groups.items(), reverse=True)}
        splits = {
            group: split_of(character, seed=split_seed, **shares)
            for group, character in first.items()
        }
        return _split_rows(glyphs, groups, splits, split_seed)

    text = tfds.features.Text()
    image = tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png")
    return prepare_demo(
        Glyphs,
        data_dir,
        made_from=[digests, pillow().__version__, *options],
        features={
            **{"image": image, "caption": text, "other": image, "character": text, "face": text},
            **{"other_face": text, "group": np.int32},
        },
        make_rows=make_rows,
    )


def draw_glyphs(
    fonts: Mapping[str, Path], *, characters: Collection[str] | None = None
) -> list[Glyph]:
    """Draw the characters of some fonts, sorted by face and code point.

    Characters without a name, controls, spaces, and marks that combine with another character are
    left out, and so are blank pictures.

    Args:
      fonts: face -> font file.
      characters: draw only these.
    """
    from PIL import ImageDraw, ImageFont

    glyphs = []
    for face, path in fonts.items():
        # The basic layout engine, because Pillow may be built without the other one.
        font = ImageFont.truetype(path, _POINTS, layout_engine=ImageFont.Layout.BASIC)
        for character in _characters(path):
            if characters is not None and character not in characters:
                continue
            picture = pillow().new("L", (SIZE, SIZE))
            draw = ImageDraw.Draw(picture)
            left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
            corner = ((SIZE - left - right) / 2, (SIZE - top - bottom) / 2)
            draw.text(corner, character, fill=255, font=font)
            pixels = np.asarray(picture)
            if pixels.any():
                glyphs.append(Glyph(character, face, pixels))
    return glyphs


def group_characters(glyphs: Iterable[Glyph]) -> dict[str, int]:
    """Join characters that share a bitmap in any face, directly or through other characters.

    Returns:
      Character -> the number of its group; groups are numbered in order of their first characters.

    Example:
      >>> ink = np.eye(2, dtype=np.uint8)
      >>> alike = [Glyph("A", "Sans", ink), Glyph("Α", "Sans", ink), Glyph("B", "Sans", 2 * ink)]
      >>> group_characters(alike)
      {'A': 0, 'B': 1, 'Α': 0}
    """
    parent: dict[str, str] = {}

    def root(character: str) -> str:
        while parent[character] != character:
            parent[character] = parent[parent[character]]
            character = parent[character]
        return character

    drawn: dict[bytes, str] = {}
    for glyph in glyphs:
        parent.setdefault(glyph.character, glyph.character)
        twin = drawn.setdefault(glyph.pixels.tobytes(), glyph.character)
        first, second = sorted((root(twin), root(glyph.character)))
        parent[second] = first
    roots = {character: root(character) for character in sorted(parent)}
    numbers = {first: number for number, first in enumerate(sorted(set(roots.values())))}
    return {character: numbers[first] for character, first in roots.items()}


def _font_files() -> dict[str, Path]:
    folder = package_folder("matplotlib", needed_by="data.name='glyphs'")
    package_folder("fontTools", needed_by="data.name='glyphs'")
    return {face: folder / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf" for face in FACES}


def _characters(path: Path) -> list[str]:
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        characters = map(chr, sorted(font.getBestCmap()))
    return [character for character in characters if _is_drawn(character)]


def _is_drawn(character: str) -> bool:
    category = unicodedata.category(character)
    is_mark = category in ("Mn", "Me")
    return bool(unicodedata.name(character, "")) and category[0] not in "CZ" and not is_mark


def _split_rows(
    glyphs: Sequence[Glyph], groups: Mapping[str, int], splits: Mapping[int, str], seed: int
) -> dict[str, list[dict[str, Any]]]:
    faces: dict[str, dict[str, Glyph]] = defaultdict(dict)
    for glyph in glyphs:
        faces[glyph.character][glyph.face] = glyph
    files = {glyph[:2]: _png(glyph.pixels) for glyph in glyphs}

    def row(glyph: Glyph, other: Glyph) -> dict[str, Any]:
        return {
            "image": files[glyph[:2]],
            "caption": unicodedata.name(glyph.character).lower(),
            "other": files[other[:2]],
            "character": glyph.character,
            "face": glyph.face,
            "other_face": other.face,
            "group": groups[glyph.character],
        }

    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first, second = _FACE_PAIR
    for glyph in glyphs:
        split = splits[groups[glyph.character]]
        drawn = faces[glyph.character]
        rows[split].append(row(glyph, _other(glyph, drawn, seed)))
        if split == "test" and glyph.face == first:
            rows["test_sans"].append(rows[split][-1])
            if second in drawn:
                rows["test_faces"].append(row(glyph, drawn[second]))
    return rows


def _other(glyph: Glyph, drawn: Mapping[str, Glyph], seed: int) -> Glyph:
    """A picture of the same character in another face, chosen at random."""
    others = [face for face in FACES if face in drawn and face != glyph.face]
    if not others:
        return glyph
    name = f"{seed} {glyph.face} {ord(glyph.character)}"
    digest = hashlib.sha256(name.encode()).digest()
    return drawn[others[int.from_bytes(digest[:8], "big") % len(others)]]


def _png(pixels: UInt8[np.ndarray, "s s"]) -> bytes:
    file = io.BytesIO()
    pillow().fromarray(pixels).save(file, "PNG")
    return file.getvalue()
