"""Opens users' evaluation sets, and detects their kind from the content of the path."""

from collections.abc import Callable
from typing import NamedTuple

from jaxcl.data.beir import is_beir
from jaxcl.data.text_files import TEXT_FILES, is_text_file
from jaxcl.evaluation.caption_set import has_captions, open_caption_set
from jaxcl.evaluation.class_set import is_class_folder, open_class_set
from jaxcl.evaluation.pair_classification import has_labels, open_pair_set
from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.evaluation.retrieval_set import open_retrieval_set
from jaxcl.evaluation.sts import open_sts_set
from jaxcl.evaluation.zero_shot import TEMPLATES_FILE, is_templates_file, open_zero_shot_set
from jaxcl.host.paths import AnyPath

__all__ = ["KINDS", "Kind", "open_set"]


class Kind(NamedTuple):
    """A kind of evaluation set.

    Attributes:
      expected: a noun phrase for such a path, such as "a BEIR folder", for messages.
      recognises: whether an existing path is of this kind; reads only a little of the content.
      open: opens such a path, and raises a `ValueError` for invalid content.
    """

    expected: str
    recognises: Callable[[AnyPath], bool]
    open: Callable[[AnyPath], EvaluationSet]


_FILE = f"a file ({', '.join(TEXT_FILES)})"
KINDS: dict[str, Kind] = {
    "retrieval": Kind(
        "a folder with corpus.jsonl, queries.jsonl and usually qrels/, or a qrels file in it",
        is_beir,
        open_retrieval_set,
    ),
    "captions": Kind(f"{_FILE} of images with captions", has_captions, open_caption_set),
    "zero_shot": Kind(
        f"the file {TEMPLATES_FILE} in a folder of images by class",
        is_templates_file,
        open_zero_shot_set,
    ),
    "classes": Kind("a folder of images by class", is_class_folder, open_class_set),
    "pairs": Kind(f"{_FILE} of pairs of texts with labels 0 and 1", has_labels, open_pair_set),
    "sts": Kind(f"{_FILE} of pairs of texts with scores", is_text_file, open_sts_set),
}
"""Name of a kind -> how to recognise and open it; the first that recognises a path is used."""


def open_set(path: AnyPath, *, kind: str | None = None) -> EvaluationSet:
    """Open an evaluation set of any kind.

    Args:
      path: a file or folder of one of `KINDS`.
      kind: the name of the kind; `None` detects it. Name it for STS scores that are all 0 or 1,
        which would otherwise be taken for labels of pair classification.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if the path is not of a known kind, or its content is invalid.
      OSError: if the path cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path} to evaluate on")
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown; use {' or '.join(KINDS)}")
        return KINDS[kind].open(path)
    for one in KINDS.values():
        if one.recognises(path):
            return one.open(path)
    expected = "; or ".join(one.expected for one in KINDS.values())
    raise ValueError(f"{path} is not an evaluation set; give {expected}")
