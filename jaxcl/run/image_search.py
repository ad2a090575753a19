"""Search over images, by texts or by images."""

from collections.abc import Mapping
from typing import Any

from jaxcl.data.images.decoding import MAX_IMAGE_BYTES, ImageRule, decode_image
from jaxcl.host.files import read_regular
from jaxcl.host.paths import AnyPath, local_path
from jaxcl.host.user_folders import cache_folder
from jaxcl.run.corpus_index import CorpusIndex, open_index, paths_digest
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.image_documents import ImageFolder, ImageRows
from jaxcl.run.searcher import Search, check_reads, image_ranker, text_ranker
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES

__all__ = [
    "read_image_folder",
    "read_query_image",
    "search_of_images",
    "search_of_rows",
    "side_of_images",
]


def read_query_image(path: AnyPath) -> bytes:
    """Read the image of a query.

    Raises:
      ValueError: if the image cannot be read or decoded; the message names the file.
    """
    try:
        image = read_regular(path, limit=MAX_IMAGE_BYTES)
    except OSError as error:
        raise ValueError(f"--image={path} cannot be read: {error.strerror or error}") from error
    try:
        decode_image(image, ImageRule(size=1))
    except ValueError as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    return image


def read_image_folder(path: AnyPath, options: Mapping[str, Any], index: AnyPath) -> ImageFolder:
    """Read a folder of images.

    Args:
      path: the folder.
      options: options for texts; none may be set.
      index: the folder of the index, which also keeps the digests of the files.

    Raises:
      ValueError: if an option is set, and as for `ImageFolder`.
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value} has no effect on a folder of images; leave it out")
    return ImageFolder(local_path(path), local_path(index) / "image_files")


def search_of_images(
    model: EmbeddingModel, images: ImageFolder | ImageRows, index: CorpusIndex, dim: int | None
) -> Search:
    """Make the search of an index of images."""
    return Search(
        text_ranker(model, index.search, dim),
        images.records,
        index.kept,
        rank_images=image_ranker(model, index.search, dim),
        of_images=True,
    )


def search_of_rows(
    model: EmbeddingModel,
    images: ImageRows,
    source: AnyPath,
    queries: str | None,
    *,
    hybrid: bool,
) -> Search:
    """Make the search of the images of rows, whose index is kept in the user's cache.

    Args:
      model: the model.
      images: the images of the rows.
      source: the path of the data; the index replaces earlier indexes with this path and model.
      queries: as for `jaxcl.search.open_search`.
      hybrid: must be false.
    """
    check_reads(model, queries)
    if hybrid:
        raise ValueError("--hybrid fuses rankings of texts, but the data hold images; leave it out")
    folder = cache_folder() / "search"
    index = open_index(model, images, folder, paths=paths_digest(source, model, {"rows": True}))
    return search_of_images(model, images, index, None)


def side_of_images(settings: Settings) -> str | None:
    """The side whose images are searched: the keys if both hold images; `None` without any."""
    modality = settings.data.modality._asdict()
    return next((side for side in reversed(SIDES) if modality[side] == "image"), None)
