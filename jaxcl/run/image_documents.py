"""Images as the documents of a search: the files of a folder, or one side of the rows of a run."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxcl.data.images.file_index import digest_of_files
from jaxcl.data.images.image_files import ImageFiles, check_images_decode, image_files
from jaxcl.data.source_fields import file_of_row, read_fields
from jaxcl.data.sources import PairSource
from jaxcl.host.files import digest_of
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.settings.file_kinds import IMAGE_SUFFIXES
from jaxcl.typing import SIDES, Float, Int

__all__ = ["Corpus", "ImageFolder", "ImageRows", "embed_documents"]


@runtime_checkable
class Corpus(Protocol):
    """Documents to search, texts or images.

    Attributes:
      ids: a name per document, all different.
      fingerprint: equal for equal documents in equal order.
      modality: `"text"` or `"image"`.
    """

    ids: Sequence[str]
    fingerprint: str
    modality: str

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """The documents of the given rows, in the order given."""
        ...


class ImageFolder:
    """The images of a folder and its subfolders; an id is a path relative to the folder.

    Args:
      folder: the folder.
      directory: the folder that keeps the digests of files, so that only changed files are read.

    Raises:
      ValueError: if the folder has no image, a link leads outside it, or a file cannot be read.
      OSError: if the digests cannot be written, except to a read-only directory.
    """

    modality = "image"

    def __init__(self, folder: Path, directory: Path) -> None:
        paths = image_files(folder)
        if not paths:
            raise ValueError(
                f"{folder} has no images; give a folder with files of the types "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        for path in paths:
            if not os.access(path, os.R_OK):  # also a link to a file that is gone
                raise ValueError(f"{path} cannot be read; remove it, or change its permissions")
        self._files = ImageFiles(paths)
        self.ids: Sequence[str] = [path.relative_to(folder).as_posix() for path in paths]
        self.fingerprint = digest_of_files(folder, self.ids, directory=directory)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        """The contents of the files of the given rows."""
        return [self._files[row] for row in np.asarray(rows, np.int64).tolist()]

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The id and the image of each of the given rows."""
        images = self.read(rows)
        return [
            {"id": self.ids[row], "text": "", "image": image}
            for row, image in zip(rows, images, strict=True)
        ]


class ImageRows:
    """The images of one side of the rows of all splits; an id is the split and the row's number.

    Args:
      sources: split -> rows.
      side: the side with the images.
    """

    modality = "image"

    def __init__(self, sources: Mapping[str, PairSource], side: str) -> None:
        self._sources, self._side = list(sources.values()), side
        self._ends = np.cumsum([len(source) for source in self._sources])
        self.ids: Sequence[str] = [
            f"{split}:{row}" for split, source in sources.items() for row in range(len(source))
        ]
        fingerprints = [[split, source.fingerprint] for split, source in sources.items()]
        self.fingerprint = digest_of(json.dumps([side, fingerprints]).encode())

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """The images of the given rows."""
        records = self._rows(np.asarray(rows, np.int64), (self._side,))
        return [record[self._side] for record in records]

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The id, the image, and the text of each of the given rows.

        The text is the other side's, or else the name of the image's file if the image has one.
        """
        return [
            {"id": self.ids[row], "text": self._text(row, record), "image": record[self._side]}
            for row, record in zip(rows, self._rows(np.asarray(rows, np.int64), SIDES), strict=True)
        ]

    def _text(self, row: int, record: Mapping[str, Any]) -> str:
        captions = [record[side] for side in SIDES if isinstance(record[side], str)]
        number = int(np.searchsorted(self._ends, row, side="right"))
        source = self._sources[number]
        first = int(self._ends[number]) - len(source)
        return next(iter(captions), None) or file_of_row(source, self._side, row - first) or ""

    def _rows(self, rows: Int[np.ndarray, " n"], names: Sequence[str]) -> list[dict[str, Any]]:
        """Some fields of the given rows, read from each split at once."""
        results: list[dict[str, Any]] = [{}] * len(rows)
        of_row = np.searchsorted(self._ends, rows, side="right")
        for number, source in enumerate(self._sources):
            places = np.flatnonzero(of_row == number)
            if places.size:
                first = self._ends[number] - len(source)
                records = read_fields(source, rows[places] - first, names)
                for position, record in zip(places, records, strict=True):
                    results[position] = record
        return results


def embed_documents(
    model: EmbeddingModel, corpus: Corpus, rows: Int[np.ndarray, " n"], *, side: str, progress: Any
) -> Float[np.ndarray, "n d"]:
    """Embed documents.

    Args:
      model: the model.
      corpus: the documents.
      rows: the documents to embed.
      side: the side that embeds texts; images are embedded by the first side that reads images.
      progress: as for `EmbeddingModel.encode`.
    """
    values = corpus.read(rows)
    if corpus.modality == "image":
        try:
            return model.encode(images=values, progress=progress)
        except ValueError:
            check_images_decode([corpus.ids[row] for row in rows.tolist()], values)
            raise
    return model.encode(values, side=side, progress=progress)
