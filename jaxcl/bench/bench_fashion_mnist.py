"""Do SimCLR's features tell clothes apart better than raw pixels and a random encoder?

    python -m jaxcl.bench fashion_mnist [--folder DIR] [--steps 600] [--seeds 1] [--leave-out]

Trains the small encoder of `configs/simclr.py` on two augmented views of the 60,000 training
pictures of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), without their labels. Then
nearest neighbours and a linear probe classify the 10,000 test pictures, given 5,000 labelled ones:
by the features below the projection head, by the encoder's features before training, and by pixels.
With `--leave-out`, SimCLR also trains without each of its augmentations, and without any. The
pictures come from Debian's package dataset-fashion-mnist.
"""

import gzip
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from jaxcl.bench.benchmark_parser import benchmark_parser
from jaxcl.data.images.decoding import pillow
from jaxcl.evaluation.class_set import Classified, classify
from jaxcl.host.progress import say
from jaxcl.metrics import mean_and_standard_error
from jaxcl.run.load_model import load
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.train import train
from jaxcl.typing import Float, Int, UInt8

__all__ = ["FOLDER", "main", "measure", "read_pictures"]

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""The folder of Debian's package."""

_CLASSES = 10
_PARTS = {"train": 4_000, "validation": 1_000}  # labelled pictures; validation tunes the probe
_BATCH = 256
_AUGMENTATION = {
    "crop_scale": (0.4, 1.0),
    "flip_rate": 0.5,
    "jitter_rate": 0.8,
    "jitter_strength": 0.5,
    "grayscale_rate": 0.0,  # the pictures are grey
    "blur_rate": 0.5,
    "interpolation": "bilinear",
}
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "SimCLR, no crop": {"augmentation.options.crop_scale": (1.0, 1.0)},
    "SimCLR, no flip": {"augmentation.options.flip_rate": 0.0},
    "SimCLR, no jitter": {"augmentation.options.jitter_rate": 0.0},
    "SimCLR, no blur": {"augmentation.options.blur_rate": 0.0},
    "SimCLR, no augmentation": {"augmentation.name": None},
}


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Train with the given flags, and classify the test pictures."""
    parser = benchmark_parser("fashion_mnist", __doc__)
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="the folder of the four .gz files"
    )
    parser.add_argument("--steps", type=int, default=600, help=f"steps of {_BATCH} pictures")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--leave-out", action="store_true", help="also train without each augmentation"
    )
    return measure(**vars(parser.parse(argv)))


def measure(*, folder: Path, steps: int, seeds: int, leave_out: bool = False) -> dict[str, Any]:
    """Train with each seed, and classify the test pictures.

    Args:
      folder: the four files of the data set.
      steps: the number of steps of a run.
      seeds: the number of seeds, from 0.
      leave_out: whether to train without each augmentation, too.

    Returns:
      The record that `jaxcl.bench` prints: accuracies.

    Raises:
      FileNotFoundError: if the folder has no data set.
    """
    pictures, classes = read_pictures(folder, "train")
    test, test_classes = read_pictures(folder, "t10k")
    stops = np.cumsum([0, *_PARTS.values()])
    parts = {name: slice(*stops[i : i + 2]) for i, name in enumerate(_PARTS)}
    images = {**{name: pictures[part] for name, part in parts.items()}, "test": test}
    labels = {**{name: classes[part] for name, part in parts.items()}, "test": test_classes}
    flat = {
        name: part.reshape(len(part), -1)[:, ::3] / np.float32(255) for name, part in images.items()
    }
    results = {"pixels": [_classified(flat, labels)]}
    settings = {
        "random encoder": {"steps": 1, "optimizer.learning_rate": 1e-12},
        "SimCLR": {},
        **(_LEFT_OUT if leave_out else {}),
    }
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = changed_config(_config(_written(Path(scratch), pictures)), {"steps": steps})
        for seed in range(seeds):
            for name, changes in settings.items():
                say(f"{name}, seed {seed}")
                start = time.process_time()
                workdir = Path(scratch) / f"{name} {seed}"
                train(changed_config(config, {"seed": seed, **changes}), workdir)
                facts[f"CPU seconds of training, {name}, seed {seed}"] = time.process_time() - start
                model = load(workdir)
                vectors = {part: model.encode(images=of) for part, of in images.items()}
                results.setdefault(name, []).append(_classified(vectors, labels))
    for name, several in results.items():
        _, error = mean_and_standard_error(several[0].correct["knn@20"])
        facts[f"standard error of knn@20 over pictures, {name}"] = error
    shapes = {"pictures": len(pictures), "batch": _BATCH, "steps": steps}
    rounds = {
        f"{name}, {metric}": [float(one.correct[metric].mean()) for one in several]
        for name, several in results.items()
        for metric in several[0].correct
    }
    return {"shapes": shapes, "unit": "accuracy", "rounds": rounds, "facts": facts}


def read_pictures(
    folder: Path, part: str
) -> tuple[UInt8[np.ndarray, "n 28 28 3"], Int[np.ndarray, " n"]]:
    """Read the pictures, converted to three equal channels, and their classes.

    Args:
      folder: the four files of the data set.
      part: `"train"` or `"t10k"`.

    Raises:
      FileNotFoundError: if the folder has no data set.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; install Debian's package dataset-fashion-mnist, or give "
            "--folder"
        )
    pictures = _read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    classes = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return np.repeat(pictures[..., None], 3, axis=-1), classes.astype(np.int32)


def _read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Read an array of bytes in the format of MNIST: a number of axes, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    sizes = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def _written(folder: Path, pictures: UInt8[np.ndarray, "n h w 3"]) -> Path:
    """Write the pictures as PNG files in the rows of a Parquet file."""
    files = []
    for picture in pictures:
        file = io.BytesIO()
        pillow().fromarray(picture).save(file, "png", compress_level=1)
        files.append(file.getvalue())
    path = folder / "pictures.parquet"
    pq.write_table(pa.table({"image": pa.array(files, pa.binary())}), path)
    return path


def _config(data: Path) -> ConfigDict:
    return changed_config(
        load_config("simclr:views"),
        {
            "data.name": str(data),
            "data.splits": {"train": "train"},
            "data.images.size": 28,
            "model.name": "convnet",
            "model.dim": 64,
            "model.options.head": (256,),
            "global_batch_size": _BATCH,
            "grad_cache.chunk_size": None,
            "augmentation.options": _AUGMENTATION,
        },
    )


def _classified(
    vectors: Mapping[str, Float[np.ndarray, "_ d"]], labels: Mapping[str, Int[np.ndarray, " _"]]
) -> Classified:
    units = {part: of / np.linalg.norm(of, axis=1, keepdims=True) for part, of in vectors.items()}
    return classify(units, labels, _CLASSES)
