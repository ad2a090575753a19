"""Do SimCLR's features tell clothes apart better than raw pixels and a random encoder?

    python -m jaxcl.bench fashion_mnist [--folder DIR] [--steps 600] [--seeds 1]

Trains the small encoder of `configs/simclr.py` on two augmented views of the 60,000 training
pictures of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), without their labels. Its features
below the projection head, those of the same encoder before training, and the pixels then classify
the 10,000 test pictures from 5,000 labelled ones, by nearest neighbours and by a linear probe.
The pictures are those of Debian's package dataset-fashion-mnist.
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
from jaxcl.metrics import mean_and_standard_error
from jaxcl.run.load_model import load
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.train import train
from jaxcl.typing import Float, Int, UInt8

__all__ = ["FOLDER", "main", "measure", "read_pictures"]

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package has the files."""

_CLASSES = 10
_PARTS = {"train": 4_000, "validation": 1_000}  # labelled pictures; the latter tune the probe
_BATCH = 256


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Measure all pictures."""
    parser = benchmark_parser("fashion_mnist", __doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the four .gz files")
    parser.add_argument("--steps", type=int, default=600, help=f"of {_BATCH} pictures")
    parser.add_argument("--seeds", type=int, default=1)
    return measure(**vars(parser.parse(argv)))


def measure(*, folder: Path, steps: int, seeds: int) -> dict[str, Any]:
    """Train with each seed, and classify the test pictures.

    Args:
      folder: the four files of the data set.
      steps: the number of steps of a run.
      seeds: the number of seeds, from 0.

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

    def figures(vectors: Mapping[str, np.ndarray]) -> Classified:
        return classify({part: _unit(of) for part, of in vectors.items()}, labels, _CLASSES)

    flat = {name: part.reshape(len(part), -1) / np.float32(255) for name, part in images.items()}
    results = {"pixels": [figures(flat)]}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "pictures.parquet"
        _write(data, pictures)
        for seed in range(seeds):
            for name, changes in (
                ("random encoder", {"steps": 1, "optimizer.learning_rate": 1e-12}),
                ("SimCLR", {"steps": steps}),
            ):
                workdir = Path(scratch) / f"{name} {seed}"
                start = time.process_time()
                train(changed_config(_config(data), {"seed": seed, **changes}), workdir)
                facts[f"CPU seconds of training, {name}, seed {seed}"] = time.process_time() - start
                model = load(workdir)
                vectors = {part: model.encode(images=of) for part, of in images.items()}
                results.setdefault(name, []).append(figures(vectors))
    shapes = {"pictures": len(pictures), "batch": _BATCH, "steps": steps}
    rounds = {
        f"{name}, {metric}": [float(one.correct[metric].mean()) for one in several]
        for name, several in results.items()
        for metric in several[0].correct
    }
    errors = mean_and_standard_error(results["SimCLR"][0].correct["knn@20"])
    facts["standard error over pictures, SimCLR, knn@20"] = float(errors[1])
    return {"shapes": shapes, "unit": "accuracy", "rounds": rounds, "facts": facts}


def read_pictures(
    folder: Path, part: str
) -> tuple[UInt8[np.ndarray, "n 28 28 3"], Int[np.ndarray, " n"]]:
    """Read the pictures, with the grey value in all three channels, and their classes.

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


def _write(path: Path, pictures: UInt8[np.ndarray, "n h w 3"]) -> None:
    files = []
    for picture in pictures:
        file = io.BytesIO()
        pillow().fromarray(picture).save(file, "png", compress_level=1)
        files.append(file.getvalue())
    pq.write_table(pa.table({"image": pa.array(files, pa.binary())}), path)


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
            "augmentation.options": {
                "crop_scale": (0.4, 1.0),
                "interpolation": "bilinear",
                "jitter_strength": 0.5,
                "grayscale_rate": 0.0,  # the pictures are grey
                "blur_rate": 0.0,
            },
        },
    )


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
