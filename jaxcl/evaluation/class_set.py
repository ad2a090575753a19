"""Classification on frozen embeddings: k nearest neighbours, and a linear probe.

When not to trust it: see the docstrings of `jaxcl.evaluation.nearest_classes` and
`jaxcl.evaluation.linear_probe`. Standard errors are over test values only; they ignore the choice
of the training part.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxcl.data.sources import PairSource
from jaxcl.evaluation.differences import Difference
from jaxcl.evaluation.finite import check_finite
from jaxcl.evaluation.labelled import PARTS, LabelledParts, read_labelled_rows
from jaxcl.evaluation.labelled_images import read_labelled_images
from jaxcl.evaluation.linear_probe import choose_strength, fit_probe
from jaxcl.evaluation.nearest_classes import neighbour_votes
from jaxcl.evaluation.per_item import mean_differences, mean_figures
from jaxcl.evaluation.protocol import Encode
from jaxcl.host.paths import AnyPath, local_path
from jaxcl.host.processes import together
from jaxcl.metrics import rank_of_key, recall_at_k_metric
from jaxcl.typing import Float, Int

__all__ = [
    "ClassSet",
    "Classified",
    "class_set_of_rows",
    "is_class_folder",
    "names_rows",
    "open_class_set",
    "open_rows",
]

_NEIGHBOURS = (20, 200)
_SPLIT = "split:"


class Classified(NamedTuple):
    """The results of a model on the test part.

    Attributes:
      correct: metric -> 1 for each test value that is classified correctly, else 0.
      strength: the inverse regularisation strength of the probe.
    """

    correct: Mapping[str, Float[np.ndarray, " n"]]
    strength: float


class ClassSet:
    """Labelled images, or other values, an `EvaluationSet`.

    Attributes:
      kind: `"classes"`.
      unit: `"images"` or `"rows"`, over which standard errors are computed.
      metrics: `"knn@20"` and `"knn@200"`, with 20 and 200 neighbours, and `"linear_probe"`.
      fingerprint: a digest of the contents, labels and parts.
      inputs: the modality of the values.
    """

    kind = "classes"
    metrics: tuple[str, ...] = ("linear_probe", *(f"knn@{k}" for k in _NEIGHBOURS))

    def __init__(self, parts: LabelledParts, *, inputs: str = "image") -> None:
        self._parts = parts
        self.fingerprint = parts.fingerprint
        self.inputs: tuple[str, ...] = (inputs,)
        self.unit = "images" if inputs == "image" else "rows"

    @property
    def description(self) -> str:
        """The numbers of classes and of values."""
        sizes = [f"{len(self._parts.values[part]):,} for {part}" for part in PARTS]
        left_out = self._parts.left_out
        return (
            f"classification of {self.unit} in {len(self._parts.classes):,} classes: "
            f"{', '.join(sizes)}"
        ) + (
            f"; {left_out:,} left out, without {self.unit} of their class to train on"
            if left_out
            else ""
        )

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Classify the test part by the embeddings of a model.

        Both classifiers learn from the training and validation parts. The regularisation of the
        probe is chosen on the validation part, with probes fitted to the training part alone.

        Returns:
          Each accuracy with its standard error over the test part, such as `"knn@20"` and
          `"knn@20_standard_error"`; the sizes of the parts; and `"probe_strength"`.

        Raises:
          ValueError: if an embedding is not finite.
        """
        return self.figures(self.measure(encode))

    def measure(self, encode: Encode) -> Classified:
        """Classify the test part."""
        vectors = {part: _unit(encode(self.inputs[0], self._parts.values[part])) for part in PARTS}
        return together(lambda: classify(vectors, self._parts.labels, len(self._parts.classes)))

    def figures(self, measured: Classified) -> dict[str, float]:
        """Compute the result of `evaluate`."""
        sizes = {f"{part}_{self.unit}": len(self._parts.labels[part]) for part in PARTS}
        return {
            **mean_figures(measured.correct),
            "probe_strength": measured.strength,
            "classes": len(self._parts.classes),
            **sizes,
        }

    def differences(self, measured: Classified, baseline: Classified) -> dict[str, Difference]:
        """The difference of each accuracy between two models."""
        return mean_differences(measured.correct, baseline.correct)


def classify(
    vectors: Mapping[str, Float[np.ndarray, "_ d"]],
    labels: Mapping[str, Int[np.ndarray, " _"]],
    num_classes: int,
) -> Classified:
    """Classify a test part by its unit vectors.

    Args:
      vectors: part -> unit vectors.
      labels: part -> the class of each vector.
      num_classes: number of classes.

    Returns:
      Whether each classifier is right for each vector. A tie for the highest score counts as wrong.
    """
    fitted = [np.concatenate([of["train"], of["validation"]]) for of in (vectors, labels)]
    test, own = vectors["test"], labels["test"]
    votes = neighbour_votes(test, *fitted, num_classes=num_classes, neighbours=_NEIGHBOURS)
    strength = choose_strength(
        *(of[part] for part in ("train", "validation") for of in (vectors, labels)),
        num_classes=num_classes,
    )
    probe = fit_probe(*fitted, num_classes=num_classes, strength=strength)
    scores = {"linear_probe": probe.scores(test)}
    scores |= {f"knn@{k}": of_k for k, of_k in votes.items()}
    correct = {
        name: recall_at_k_metric(rank_of_key(of_classes, own), cutoff=1)
        for name, of_classes in scores.items()
    }
    return Classified(correct, strength)


def is_class_folder(path: AnyPath) -> bool:
    """Whether a path is a folder with subfolders."""
    return path.is_dir() and any(
        folder.is_dir() and not folder.name.startswith(".") for folder in path.iterdir()
    )


def open_class_set(path: AnyPath) -> ClassSet:
    """Open a folder of labelled images.

    Raises:
      ValueError, OSError: as for `jaxcl.evaluation.labelled_images.read_labelled_images`.
    """
    return ClassSet(read_labelled_images(local_path(path)))


def names_rows(data: object) -> bool:
    """Whether a user names rows of a run's data, as `split:ROLE`, instead of a path."""
    return str(data).startswith(_SPLIT)


def open_rows(
    name: str, sources: Mapping[str, PairSource], *, modality: Mapping[str, str]
) -> ClassSet:
    """Open the rows of a run's data as a set whose classes are their groups.

    Args:
      name: `split:ROLE`, which is divided into parts, or `split:ROLE/ROLE`, the splits for training
        and for testing.
      sources: role -> rows.
      modality: side -> modality.

    Raises:
      ValueError: for an unknown role, or as for `class_set_of_rows`.
    """
    train, slash, test = name.removeprefix(_SPLIT).partition("/")
    for role in (train, test) if slash else (train,):
        if role not in sources:
            raise ValueError(
                f"{name} names the split {role!r}, but the splits are {', '.join(sources)}; write "
                f"{_SPLIT}ROLE, or {_SPLIT}ROLE/ROLE for training and test"
            )
    return class_set_of_rows(sources[train], sources[test] if slash else None, modality=modality)


def class_set_of_rows(
    train: PairSource, test: PairSource | None, *, modality: Mapping[str, str]
) -> ClassSet:
    """Build a set from the rows of a run's data, whose classes are their groups.

    Args:
      train, test: as for `jaxcl.evaluation.labelled.read_labelled_rows`.
      modality: side -> modality. The first side with images is classified, or else the queries.
    """
    side = next((side for side, kind in modality.items() if kind == "image"), "query")
    parts = read_labelled_rows(train, test, side=side)
    return ClassSet(parts, inputs="image" if modality[side] == "image" else side)


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    check_finite(vectors, "embeddings")
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-30)).astype(np.float32)
