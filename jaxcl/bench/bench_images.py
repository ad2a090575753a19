"""How many images are decoded and augmented per second, and how long does a step wait for them?

    python -m jaxcl.bench images [--sizes 224 512 1024] [--threads 1 2] [--rounds 3]

The images are generated photographs (smooth, with some noise) as JPEG, and as PNG at the smallest
size. They are decoded to 224 × 224 as in training, from memory, so that no disk is measured. JPEGs
of at least twice that size are decoded at a fraction of their size.

The presets of augmentations run on one device, on batches of decoded images.

The step is the loss and the gradient of a small convolutional encoder on one device. While it runs,
worker threads decode the next batches, on the same cores if the device is a CPU. The table has the
share of the time that the loop spends waiting for a batch.
"""

import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.data.images.decoding import ImageRule, pillow
from jaxcl.data.images.image_table import ImageTable
from jaxcl.data.loader import training_batches
from jaxcl.data.sources import InMemoryPairs
from jaxcl.models.image_augmentations import clip, moco_v2, simclr
from jaxcl.ops.mesh import make_mesh
from jaxcl.typing import Array, Augment, Float, Key, PyTree, UInt8

__all__ = ["main", "measure"]

_RESULT = 224
_QUALITY = 90
_CHANNELS = (3, 32, 64, 128)
_PRESETS: Mapping[str, Callable[[], Augment]] = {
    "augmentation, simclr": simclr,
    "augmentation, moco_v2": moco_v2,
    "augmentation, clip": clip,
}


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure decoding and waiting with the sizes that the flags give."""
    parser = benchmark_parser("images", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128, help="images per measurement")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="steps per measurement of waiting")
    arguments = parser.parse(argv)
    return measure(
        arguments.sizes,
        arguments.threads,
        rounds=arguments.rounds,
        num_images=arguments.images,
        batch_size=arguments.batch_size,
        num_steps=arguments.steps,
    )


def measure(
    sizes: Sequence[int],
    threads: Sequence[int],
    *,
    rounds: int = 3,
    num_images: int = 128,
    batch_size: int = 32,
    num_steps: int = 12,
    result: int = _RESULT,
) -> dict[str, Any]:
    """Measure decoding, waiting and augmentations, in turn.

    Args:
      sizes: heights and widths of the JPEGs, in pixels.
      threads: numbers of threads that decode.
      rounds: the number of measurements of each.
      num_images: images per measurement of decoding.
      batch_size, num_steps: the batches of a measurement of waiting, or of an augmentation.
      result: the height and width of the decoded images.

    Returns:
      The record that `jaxcl.bench` prints, in images per second; the shares of waiting are facts.
    """
    sources = {f"JPEG {size}": _source(size, "JPEG", num_images) for size in sizes}
    sources[f"PNG {min(sizes)}"] = _source(min(sizes), "PNG", num_images)
    step = _make_step()
    cases = {
        f"{name}, {count} threads": _table(source, result, count)
        for name, source in sources.items()
        for count in threads
    }
    augmentations = {name: _augmentation(name, result, batch_size) for name in _PRESETS}
    figures: dict[str, list[float]] = {name: [] for name in (*cases, *augmentations)}
    waiting: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, table in cases.items():
            figures[name].append(_images_per_second(table))
            waiting[name].append(_waiting_share(table, step, batch_size, num_steps))
        for name, augment in augmentations.items():
            start = time.perf_counter()
            for number in range(num_steps):
                jax.block_until_ready(augment(jax.random.key(number)))
            figures[name].append(num_steps * batch_size / (time.perf_counter() - start))
    facts = {
        f"{name}: share of a step spent waiting": float(np.median(shares))
        for name, shares in waiting.items()
    }
    facts |= {f"{name}: bytes per image": _mean_bytes(one) for name, one in sources.items()}
    shapes = {"images": num_images, "batch": batch_size, "steps": num_steps, "result": result}
    return {"shapes": shapes, "unit": "images/s", "rounds": figures, "facts": facts}


def _source(size: int, format_: str, num_images: int) -> InMemoryPairs:
    files = [_photograph(size, format_, seed) for seed in range(min(num_images, 16))]
    files = [files[number % len(files)] for number in range(num_images)]
    return InMemoryPairs(files, files)


def _photograph(size: int, format_: str, seed: int) -> bytes:
    """A smooth image with a little noise, whose file is about as large as a photograph's."""
    rng = np.random.default_rng(seed)
    coarse = pillow().fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    smooth = np.asarray(coarse.resize((size, size), pillow().Resampling.BICUBIC), np.float32)
    noisy = np.clip(smooth + rng.normal(scale=6, size=smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    pillow().fromarray(noisy).save(file, format_, quality=_QUALITY)
    return file.getvalue()


def _mean_bytes(source: InMemoryPairs) -> int:
    return round(np.mean([len(record["query"]) for record in source.read(range(len(source)))]))


def _table(source: InMemoryPairs, result: int, threads: int) -> ImageTable:
    numbers = np.arange(len(source), dtype=np.int32)
    return ImageTable(
        source,
        ImageRule(result),
        group=np.zeros_like(numbers),
        text=numbers,
        both_equal=True,
        threads=threads,
    )


def _images_per_second(table: ImageTable) -> float:
    table.side("query", np.arange(1))  # starts the threads
    start = time.perf_counter()
    table.side("query", np.arange(table.num_rows))
    return table.num_rows / (time.perf_counter() - start)


def _waiting_share(
    table: ImageTable, step: Callable[..., Any], batch_size: int, num_steps: int
) -> float:
    """The share of the time of some steps in which the loop waits for its batch."""

    def rows_of(number: int) -> np.ndarray:
        return np.arange(number * batch_size, (number + 1) * batch_size) % table.num_rows

    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    batches = training_batches(table, rows_of, mesh, first_step=0, last_step=num_steps)
    weights = _weights()
    waited, start = 0.0, 0.0
    for number in range(num_steps):
        begin = time.perf_counter()
        batch = next(batches)
        if number == 1:  # the first batch waits for the threads, and its step compiles
            start = begin
        if number:
            waited += time.perf_counter() - begin
        weights = jax.block_until_ready(step(weights, batch["query"]["image"]))
    return waited / (time.perf_counter() - start)


def _weights() -> list[Float[Array, "3 3 _ _"]]:
    keys = jax.random.split(jax.random.key(0), len(_CHANNELS) - 1)
    shapes = zip(keys, _CHANNELS, _CHANNELS[1:], strict=False)
    return [0.1 * jax.random.normal(key, (3, 3, before, after)) for key, before, after in shapes]


def _augmentation(name: str, size: int, batch_size: int) -> Callable[[Key[Array, ""]], PyTree]:
    """Compile a preset on a batch of random images, as a function of the key."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    augment = _PRESETS[name]()

    @jax.jit
    def run(images: UInt8[Array, "b s s 3"], key: Key[Array, ""]) -> PyTree:
        return jax.vmap(augment)({"image": images}, jax.random.split(key, batch_size))

    compiled = functools.partial(run, jax.device_put(images, jax.devices()[0]))
    jax.block_until_ready(compiled(jax.random.key(0)))
    return compiled


def _make_step() -> Callable[..., Any]:
    """Make the gradient step of three strided convolutions, for any square images."""

    def loss(
        weights: list[Float[Array, "3 3 _ _"]], images: UInt8[Array, "b s s 3"]
    ) -> Float[Array, ""]:
        hidden = images.astype(jnp.float32) / 255
        for weight in weights:
            hidden = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    hidden, weight, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        vectors = hidden.mean((1, 2))
        return jax.nn.logsumexp(vectors @ vectors.T)

    @jax.jit
    def step(weights: Any, images: UInt8[Array, "b s s 3"]) -> Any:
        gradients = jax.grad(loss)(weights, images)
        return jax.tree.map(lambda weight, gradient: weight - 1e-3 * gradient, weights, gradients)

    return step
