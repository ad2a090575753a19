"""The benchmark on Fashion-MNIST: its reader, tiny pictures, and Debian's package."""

import gzip

import numpy as np
import pytest

from jaxcl.bench import bench_fashion_mnist
from jaxcl.bench.bench_fashion_mnist import FOLDER, measure, read_pictures


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes: the upper or the lower half is bright."""
    rng = np.random.default_rng(0)
    for part, count in {"train": 96, "t10k": 16}.items():
        classes = (np.arange(count) % 2).astype(np.uint8)
        pictures = rng.integers(0, 60, (count, 28, 28), np.uint8)
        pictures[classes == 0, :14] += 150
        pictures[classes == 1, 14:] += 150
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", classes)
    return tmp_path


def test_pictures_and_classes_are_read(folder):
    pictures, classes = read_pictures(folder, "t10k")
    assert pictures.shape == (16, 28, 28, 3)
    assert pictures.dtype == np.uint8
    assert np.array_equal(pictures[..., 0], pictures[..., 2])
    assert pictures[0, :14].min() >= 150 > pictures[0, 14:].max()
    assert np.array_equal(classes, np.arange(16) % 2)


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        read_pictures(tmp_path / "missing", "train")


@pytest.mark.slow
def test_every_setting_is_measured(folder, monkeypatch):
    monkeypatch.setattr(bench_fashion_mnist, "_PARTS", {"train": 64, "validation": 32})
    monkeypatch.setattr(bench_fashion_mnist, "_BATCH", 16)
    record = measure(folder=folder, steps=2, seeds=1)
    assert record["rounds"]["pixels, knn@20"] == [1.0]
    assert record["rounds"]["pixels, linear_probe"] == [1.0]
    assert {name.split(",")[0] for name in record["rounds"]} == {
        "pixels",
        "random encoder",
        "SimCLR",
    }


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is missing")
def test_simclr_beats_a_random_encoder_and_the_neighbours_of_pixels():
    rounds = measure(folder=FOLDER, steps=300, seeds=1)["rounds"]
    for metric in ("knn@20", "linear_probe"):
        assert rounds[f"SimCLR, {metric}"] > rounds[f"random encoder, {metric}"]
    assert rounds["SimCLR, knn@20"] > rounds["pixels, knn@20"]
