"""Files of evaluation sets of images whose "images" a stand-in model reads as numbers.

Sets never decode images, so a file may hold any bytes. The stand-in embeds the text of a file, or a
caption, by a table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def model_of(vectors: Mapping[str, Sequence[float]]):
    """An `Encode` that looks up each caption, or the content of each image, in a table."""
    calls = []

    def encode(inputs, values):
        calls.append((inputs, len(values)))
        texts = [_text(value) for value in values]
        return np.array([vectors[text] for text in texts], np.float32)

    encode.calls = calls
    return encode


def write_image(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else value
