"""Zero-shot classification: images are compared with texts about each class.

The text embedding of a class is the mean over several templates, such as "a photo of a {}.".

When not to trust it: the accuracy depends on the wording of names and templates. Choose them on
images that are not in the test set.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxcl.data.images.image_files import ImageFiles
from jaxcl.evaluation.labelled_images import read_class_folders
from jaxcl.evaluation.per_item import mean_differences, mean_figures
from jaxcl.evaluation.protocol import Encode
from jaxcl.evaluation.retrieval import dense_scores
from jaxcl.host.files import read_text
from jaxcl.host.paths import AnyPath, local_path
from jaxcl.metrics import rank_of_key, recall_at_k_metric
from jaxcl.typing import Float, Int

__all__ = [
    "CLASSES_FILE",
    "DEFAULT_TEMPLATES",
    "TEMPLATES_FILE",
    "ZeroShotSet",
    "class_embeddings",
    "is_templates_file",
    "open_zero_shot_set",
]

TEMPLATES_FILE = "templates.txt"
CLASSES_FILE = "classes.tsv"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""The template for a folder without `templates.txt`."""

_PLACE = "{}"
_CUTOFFS = (1, 5)


class ZeroShotSet:
    """Labelled images and the names of their classes, an `EvaluationSet`.

    Attributes:
      kind: `"zero_shot"`.
      unit: `"images"`.
      metrics: `"accuracy"`, and `"accuracy@5"` with more than five classes.
      fingerprint: a digest of the images, labels, names and templates.
      inputs: `("image", "text")`.
    """

    kind = "zero_shot"
    unit = "images"
    inputs: tuple[str, ...] = ("image", "text")

    def __init__(
        self,
        images: Sequence[bytes],
        labels: Int[np.ndarray, " n"],
        names: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        """Check names and templates.

        Args:
          images: the contents of image files.
          labels: the number of each image's class.
          names: the name of each class, as it appears in texts.
          templates: texts that contain `{}` once, for the name.

        Raises:
          ValueError: for fewer than two classes, two equal names, or a template without exactly one
        `{}`.
        """
        _check_names(names)
        check_templates(templates)
        self._images, self._labels = images, labels
        self._names, self._templates = tuple(names), tuple(templates)
        cutoffs = [cutoff for cutoff in _CUTOFFS if cutoff == 1 or cutoff < len(names)]
        self._cutoffs = {"accuracy" if k == 1 else f"accuracy@{k}": k for k in cutoffs}
        self.metrics: tuple[str, ...] = tuple(self._cutoffs)
        digest = hashlib.sha256("\0".join([*self._names, "", *self._templates]).encode())
        for image, label in zip(images, labels.tolist(), strict=True):
            digest.update(f"{label} ".encode() + hashlib.sha256(image).digest())
        self.fingerprint = digest.hexdigest()

    @property
    def description(self) -> str:
        """The numbers of images, classes and templates."""
        return (
            f"zero-shot classification of {len(self._images):,} images in {len(self._names):,} "
            f"classes, with {len(self._templates):,} templates"
        )

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Classify the images.

        Returns:
          The share of images whose class has the highest similarity; with more than five classes,
          also the share whose class is among the five highest. Each has a standard error. Equal
          similarities share their mean rank. The sizes of the set are included.

        Raises:
          ValueError: if an embedding is not finite.
        """
        return self.figures(self.measure(encode))

    def measure(self, encode: Encode) -> dict[str, Float[np.ndarray, " n"]]:
        """Metric -> 1 for each image that is classified correctly, else 0."""
        classes = class_embeddings(encode, self._names, self._templates)
        ranks = rank_of_key(dense_scores(encode("image", self._images), classes), self._labels)
        return {name: recall_at_k_metric(ranks, cutoff=k) for name, k in self._cutoffs.items()}

    def figures(self, measured: Mapping[str, Float[np.ndarray, " n"]]) -> dict[str, float]:
        """Compute the result of `evaluate`."""
        sizes = {"images": len(self._images), "classes": len(self._names)}
        return {**mean_figures(measured), **sizes, "templates": len(self._templates)}

    differences = staticmethod(mean_differences)


def class_embeddings(
    encode: Encode, names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes d"]:
    r"""The unit embedding of each class from texts about it.

    $$c = \frac{m}{\lVert m \rVert}, \qquad
    m = \frac{1}{T} \sum_t \frac{e_t}{\lVert e_t \rVert}$$

    over the embeddings e of the templates, filled with the name.

    Args:
      encode: embeds texts; called once.
      names: the names of the classes.
      templates: texts that contain `{}` once.

    Reference: Radford et al., "Learning Transferable Visual Models From Natural Language
      Supervision", ICML 2021, section 3.1.4.
    """
    texts = [template.replace(_PLACE, name) for name in names for template in templates]
    units = _unit(encode("text", texts)).reshape(len(names), len(templates), -1)
    return _unit(units.mean(1))


def check_templates(templates: Sequence[str]) -> None:
    """Raise a `ValueError` if there are no templates, or one does not contain `{}` exactly once."""
    for template in templates:
        if template.count(_PLACE) != 1:
            raise ValueError(
                f"the template {template!r:.80} has {template.count(_PLACE)} placeholders for the "
                "name of a class; write {} exactly once in each"
            )
    if not templates:
        raise ValueError("there are no templates; write at least one, such as 'a photo of a {}.'")


def is_templates_file(path: AnyPath) -> bool:
    """Whether a path is a file of templates in a folder."""
    return path.is_file() and path.name == TEMPLATES_FILE


def open_zero_shot_set(path: AnyPath) -> ZeroShotSet:
    """Open a folder of labelled images, given the folder or its file of templates.

    The images are in a folder per class, in the subfolder `test` if there is one. The name of a
    class is the second column of `classes.tsv`, whose first column is the name of the folder;
    without that file, it is the name of the folder with underscores as spaces.

    Raises:
      ValueError: if there are no images, or names or templates are invalid.
      OSError: if a file cannot be read.
    """
    source = local_path(path)
    folder = source if source.is_dir() else source.parent
    templates = _templates(folder / TEMPLATES_FILE)
    files = read_class_folders(folder / "test" if (folder / "test").is_dir() else folder)
    if not files:
        raise ValueError(f"{folder} has no images; give a folder with a subfolder for each class")
    names = _class_names(folder / CLASSES_FILE, list(files))
    paths = [file for of_class in files.values() for file in of_class]
    counts = [len(of_class) for of_class in files.values()]
    labels = np.repeat(np.arange(len(files)), counts)
    # Classes without images are candidates as well.
    ordered = [names.pop(name) for name in files]
    try:
        return ZeroShotSet(ImageFiles(paths), labels, [*ordered, *names.values()], templates)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _templates(path: Path) -> list[str]:
    if not path.exists():
        return list(DEFAULT_TEMPLATES)
    return [line for line in map(str.strip, read_text(path).splitlines()) if line]


def _class_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """Folder -> name of its class, for all folders and all other classes in `classes.tsv`."""
    if not path.exists():
        return {folder: folder.replace("_", " ") for folder in folders}
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        folder, tab, name = line.partition("\t")
        if not tab or not name.strip() or folder in names:
            raise ValueError(
                f"{path}: line {number} is {line!r:.80}; write the name of a folder, a tab, and "
                "the name of its class, each folder once"
            )
        names[folder] = name.strip()
    missing = [folder for folder in folders if folder not in names]
    if missing:
        raise ValueError(
            f"{path} has no line for {len(missing)} of {len(folders)} folders, first {missing[0]!r}"
        )
    return names


def _check_names(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ValueError(f"there are {len(names)} classes; give at least two")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two classes have the name {name!r:.80}; name them differently")
        seen.add(name)


def _unit(vectors: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    wide = np.asarray(vectors, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-30)
