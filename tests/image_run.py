"""A small run with images: coloured squares, their names, and a tiny encoder.

Each row is a picture of a colour at some place, with the name of the colour as its caption. The
group of a row is the number of its colour.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from jaxcl.data.sources import InMemoryPairs
from jaxcl.models.towers import EncoderPart
from jaxcl.ops.vectors import normalise
from jaxcl.settings.config_files import load_config

SIZE = 8
COLOURS = {
    "red": (230, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 230),
    "yellow": (240, 240, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}
ROWS = {"train": 48, "validation": 12, "test": 12}


def picture(name: str, number: int) -> bytes:
    """A PNG of a square of a colour on grey, at a place that depends on the number."""
    pixels = np.full((SIZE, SIZE, 3), 128, np.uint8)
    top, left = number % 3, number // 3 % 4
    pixels[top : top + 5, left : left + 5] = COLOURS[name]
    pixels[-1, :, 0] = number  # no two pictures are equal
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def open_captions(role: str) -> InMemoryPairs:
    """Pictures with captions that no other row has."""
    return _rows(role, lambda name, number: f"a {name} square, number {number}")


def open_views(role: str) -> InMemoryPairs:
    """Pictures; both sides of a pair are views of one."""
    return _rows(role, picture)


def _rows(role, key_of) -> InMemoryPairs:
    first = 100 * list(ROWS).index(role)
    names = list(COLOURS)
    rows = [(names[number % len(names)], first + number) for number in range(ROWS[role])]
    groups = [names.index(name) for name, _ in rows]
    images = [picture(name, number % 256) for name, number in rows]
    keys = [key_of(name, number % 256) for name, number in rows]
    return InMemoryPairs(images, keys, groups=groups)


class MeanColour(nnx.Module):
    """A linear layer on the mean colour of each quarter of an image."""

    def __init__(self, size: int, *, dim: int, rngs: nnx.Rngs):
        self.size = size
        self.layer = nnx.Linear(12, dim, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        images = inputs["image"]
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        half = self.size // 2
        quarters = images.reshape(len(images), 2, half, 2, half, 3).mean((2, 4))
        return normalise(self.layer(quarters.reshape(len(images), -1)))


ENCODER = EncoderPart(MeanColour)


def shifted(*, most: int):
    """An augmentation that shifts an image by up to some pixels, and returns floats."""

    def augment(inputs, key):
        shift = jax.random.randint(key, (2,), -most, most + 1)
        image = jnp.roll(inputs["image"].astype(jnp.float32) / 255, shift, axis=(0, 1))
        return {"image": image}

    return augment


def image_config(source: str, folder, **changes):
    """The config of a run on `"captions"` or `"views"`."""
    config = load_config("base")
    config.steps, config.global_batch_size = 4, 16
    config.data.name = f"tests.image_run:open_{source}"
    config.data.splits = {role: role for role in ROWS}
    config.data.images.size = SIZE
    config.data.modality.query = "image"
    config.data.vocabulary_size, config.data.max_tokens.key = 300, 12
    config.model.name, config.model.dim = "tests.image_run:ENCODER", 8
    config.augmentation.name = "tests.image_run:shifted"
    config.augmentation.options = {"most": 2}
    if source == "views":
        config.data.modality.key = "image"
    else:
        config.model.shared, config.model.key.name = False, "static"
        config.augmentation.sides = ("query",)
    config.run.data_dir = str(folder / "data")
    config.run.evaluate_every = 2
    config.update_from_flattened_dict(changes)
    return config
