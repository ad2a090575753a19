"""The index of a corpus on disk: embeddings of its documents, and their quantised codes.

Each index is a folder, named by digests of the paths and the content of its model and corpus:

    keys.npy           embeddings of the documents, ready for inner products, in float32
    keys-64.npy        the embeddings truncated to 64 dimensions
    int8.npy           int8 codes of keys.npy, and int8-64.npy of keys-64.npy
    binary.npy         binary codes of the same arrays
    search_index.json  how much of the exact ranking the search keeps

Next to each array is a log with the digests of its blocks (`jaxcl.host.block_file`). Embedding
resumes after the last finished block; if a block is damaged, the rows from there on are recomputed.
When the index of a changed model or corpus is complete, the previous one is removed.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.host.block_file import BlockFile, complete_array
from jaxcl.host.file_locks import HAS_LOCKS, lock_file
from jaxcl.host.files import digest_of, is_remote, read_sealed_json, write_sealed_json
from jaxcl.host.paths import AnyPath
from jaxcl.host.progress import progress_bar, say
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.host_vectors import for_inner_products, quantized, truncated
from jaxcl.run.image_documents import Corpus, embed_documents
from jaxcl.run.vector_search import PRECISIONS, RESCORE, VectorSearch, share_kept
from jaxcl.typing import Float

__all__ = [
    "CorpusIndex",
    "check_options",
    "describe_kept",
    "open_index",
    "paths_digest",
    "query_vectors",
]

_RECORD = "search_index.json"
_LOCK = "lock"
_FORMAT = 1
_BLOCK_ROWS = 1024
_SAMPLE = 200
_SAMPLE_TOP = 10
_QUERIES_AT_ONCE = 25


class CorpusIndex(NamedTuple):
    """An opened index.

    Attributes:
      search: the search over the vectors of the documents.
      kept: measured shares of an exact ranking's top 10 that are also in the top 10 of a cheaper
        search. The queries are up to 200 random documents, each left out of its own ranking.
        `"dim"` compares truncated vectors with all dimensions; `"search"` compares the quantised
        search with float32 vectors, and `"codes"` does so without rescoring. Shares that do not
        apply are left out.
    """

    search: VectorSearch
    kept: Mapping[str, float]


def open_index(
    model: EmbeddingModel,
    documents: Corpus,
    base: Path,
    *,
    paths: str,
    dim: int | None = None,
    precision: str = "float32",
    rescore: int = 1,
) -> CorpusIndex:
    """Open the index of a corpus, and compute its missing, damaged or outdated parts.

    Args:
      model: the model that embeds the documents as keys.
      documents: the corpus.
      base: folder of all indexes; created if necessary.
      paths: the digest of the paths of model and corpus, from `paths_digest`. A complete index
        replaces earlier indexes with the same paths.
      dim: number of dimensions to search with; `None` for all.
      precision, rescore: as for `VectorSearch`.

    Raises:
      ValueError: if an embedding is not finite, or no inner product gives the model's similarity.
      OSError: if the folder cannot be written.
    """
    dim = None if dim == model.dim else dim
    query_vectors(model, np.zeros((0, model.dim), np.float32), dim)  # raises before any work
    made_from = {
        "format": _FORMAT,
        "model": model.made_from,
        "similarity": model.similarity_function,
        "documents": documents.fingerprint,
    }
    folder = _folder(base, paths, digest_of(json.dumps(made_from, sort_keys=True).encode()))
    with _locked(folder):
        full_keys = keys = _embedded(model, documents, folder)
        if dim is not None:
            keys = _truncated_keys(model, full_keys, dim, folder)
        search = VectorSearch(keys)
        if precision != "float32":
            codes = _codes(keys, precision, dim, folder)
            search = VectorSearch(keys, codes, precision, rescore)
        shares = _kept(model, documents, full_keys, search, dim, folder, made_from)
    _remove_earlier(base, paths, folder)
    return CorpusIndex(search, shares)


def check_options(
    model: EmbeddingModel, dim: int | None, precision: str, rescore: int | None
) -> int:
    """Check the options of a search before any work is done.

    Args:
      model, dim, precision: as for `open_index`.
      rescore: number of candidates per hit to score exactly; `None` for the default in `RESCORE`.

    Returns:
      The number of candidates per hit.

    Raises:
      ValueError: if a value is unknown, out of range, without effect, or does not suit the model.
    """
    _check_dim(model, dim)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; use {', '.join(PRECISIONS)}")
    bounded = model.normalizes or model.similarity_function == "cosine"
    if precision == "int8" and not bounded:
        raise ValueError(
            "precision='int8' needs unit vectors, but this model compares vectors of any length; "
            "use 'binary' or 'float32'"
        )
    if rescore is None:
        return RESCORE.get(precision, 1)
    if precision == "float32":
        raise ValueError(
            f"rescore={rescore} has no effect with precision='float32', which is exact; leave it "
            "out"
        )
    if rescore < 1:
        raise ValueError(f"rescore={rescore} must be at least 1")
    return rescore


def _check_dim(model: EmbeddingModel, dim: int | None) -> None:
    if dim is None or dim == model.dim:
        return
    if not 1 <= dim <= model.dim:
        raise ValueError(f"dim={dim} is out of range; the model has dimensions 1 to {model.dim}")
    trained = model.matryoshka_dims
    if trained and dim not in trained:
        lengths = ", ".join(map(str, sorted({*trained, model.dim})))
        raise ValueError(f"the model was not trained at dim={dim}; use one of {lengths}")
    if not trained:
        say(
            f"{model.source} may not have been trained at shorter lengths; check how much of the "
            f"ranking {dim} dimensions keep"
        )


def describe_kept(kept: Mapping[str, float], dim: int | None, precision: str) -> list[str]:
    """Describe how much of an exact ranking a search of the index keeps, one line per measurement.

    Args:
      kept: `CorpusIndex.kept`.
      dim, precision: as for `open_index`.
    """
    method = "measured with random documents as queries"
    lines = []
    if "dim" in kept:
        lines.append(
            f"{dim} dimensions keep {kept['dim']:.1%} of the top {_SAMPLE_TOP} by all dimensions, "
            + method
        )
    if "search" in kept:
        lines.append(
            f"{precision} with rescoring keeps {kept['search']:.1%} of the top {_SAMPLE_TOP} by "
            f"float32 ({kept['codes']:.1%} without rescoring), {method}"
        )
    return lines


def paths_digest(corpus: AnyPath, model: EmbeddingModel, fields: Mapping[str, Any]) -> str:
    """Compute a digest of the paths of a corpus and a model, whatever the files contain."""
    path = str(corpus) if is_remote(corpus) else os.path.abspath(corpus)
    return digest_of(json.dumps([path, os.path.abspath(model.source), fields]).encode())


def query_vectors(
    model: EmbeddingModel, embeddings: Float[np.ndarray, "q d"], dim: int | None
) -> Float[np.ndarray, "q _"]:
    """Truncate embeddings of queries to `dim` dimensions, and prepare them for inner products.

    Raises:
      ValueError: as for `for_inner_products`.
    """
    vectors = truncated(embeddings, dim, normalizes=model.normalizes)
    return for_inner_products(model.similarity_function, "query", vectors)


def _key_vectors(model: EmbeddingModel, embeddings: np.ndarray, dim: int | None) -> np.ndarray:
    vectors = truncated(embeddings, dim, normalizes=model.normalizes)
    return for_inner_products(model.similarity_function, "key", vectors)


def _embedded(model: EmbeddingModel, documents: Corpus, folder: Path) -> np.ndarray:
    def rows_of(rows: slice, advance: Callable[[int], object]) -> np.ndarray:
        numbers = np.arange(rows.start, rows.stop)
        vectors = embed_documents(model, documents, numbers, side="key", progress=advance)
        invalid = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if invalid.size:
            name = documents.ids[rows.start + int(invalid[0])]
            raise ValueError(f"the embedding of document {name!r} is not finite; check the model")
        return _key_vectors(model, vectors, None)

    width = _key_vectors(model, np.zeros((0, model.dim), np.float32), None).shape[1]
    return _array(
        folder / "keys.npy",
        (len(documents), width),
        np.float32,
        rows_of,
        title="embedding documents",
    )


def _truncated_keys(
    model: EmbeddingModel, full_keys: np.ndarray, dim: int, folder: Path
) -> np.ndarray:
    def rows_of(rows: slice, advance: Callable[[int], object]) -> np.ndarray:
        advance(rows.stop - rows.start)
        # Leave out the column that Euclidean distances add, since it depends on the dimensions.
        return _key_vectors(model, full_keys[rows, : model.dim], dim)

    width = _key_vectors(model, np.zeros((0, model.dim), np.float32), dim).shape[1]
    path, title = folder / f"keys-{dim}.npy", f"truncating to {dim} dimensions"
    return _array(path, (len(full_keys), width), np.float32, rows_of, title=title)


def _codes(keys: np.ndarray, precision: str, dim: int | None, folder: Path) -> np.ndarray:
    def rows_of(rows: slice, advance: Callable[[int], object]) -> np.ndarray:
        advance(rows.stop - rows.start)
        return quantized(keys[rows], precision)

    empty = quantized(keys[:0], precision)
    name = precision if dim is None else f"{precision}-{dim}"
    return _array(
        folder / f"{name}.npy",
        (len(keys), empty.shape[1]),
        empty.dtype.type,
        rows_of,
        title=f"quantising to {precision}",
    )


def _array(
    path: Path,
    shape: tuple[int, int],
    dtype: type,
    rows_of: Callable[[slice, Callable[[int], object]], np.ndarray],
    *,
    title: str,
) -> np.ndarray:
    """Compute the missing rows of an array in a file, and memory-map the array."""
    array = complete_array(path, shape, dtype)
    if array is not None:
        return array
    blocks = BlockFile(path, shape, dtype)
    with progress_bar(title, shape[0]) as advance:
        advance(blocks.done)
        while blocks.done < shape[0]:
            rows = slice(blocks.done, min(blocks.done + _BLOCK_ROWS, shape[0]))
            blocks.append(rows_of(rows, advance))
    return blocks.array


def _kept(
    model: EmbeddingModel,
    documents: Corpus,
    full_keys: np.ndarray,
    search: VectorSearch,
    dim: int | None,
    folder: Path,
    made_from: Mapping[str, Any],
) -> dict[str, float]:
    """Measure `CorpusIndex.kept`, or read it if these options were measured before."""
    if dim is None and search.codes is None:
        return {}
    name = f"dim={dim} precision={search.precision} rescore={search.rescore}"
    measured = _read_measured(folder)
    if name not in measured:
        measured[name] = _measure(model, documents, full_keys, search, dim)
        with contextlib.suppress(OSError):  # if this user may only read the folder
            write_sealed_json(folder / _RECORD, {"made_from": made_from, "measured": measured})
    return measured[name]


def _read_measured(folder: Path) -> dict[str, dict[str, float]]:
    try:
        return dict(read_sealed_json(folder / _RECORD)["measured"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measure(
    model: EmbeddingModel,
    documents: Corpus,
    full_keys: np.ndarray,
    search: VectorSearch,
    dim: int | None,
) -> dict[str, float]:
    size = min(_SAMPLE, len(documents))
    sample = np.sort(np.random.default_rng(0).choice(len(documents), size, replace=False))
    embeddings = embed_documents(model, documents, sample, side="query", progress=False)
    searches = {"float": VectorSearch(search.keys)}
    if search.codes is not None:
        searches |= {"search": search, "codes": search._replace(rescore=1)}
    if dim is not None:
        searches["full"] = VectorSearch(full_keys)
    rankings: dict[str, list[np.ndarray]] = {}
    with progress_bar("measuring the share kept", size * len(searches)) as advance:
        for name, variant in searches.items():
            queries = query_vectors(model, embeddings, None if name == "full" else dim)
            rankings[name] = []
            for first in range(0, size, _QUERIES_AT_ONCE):
                part = queries[first : first + _QUERIES_AT_ONCE]
                rankings[name] += [best.rows for best in variant.best(part, _SAMPLE_TOP + 1)]
                advance(len(part))
    pairs = {"dim": ("float", "full"), "search": ("search", "float"), "codes": ("codes", "float")}
    return {
        name: share_kept(rankings[one], rankings[other], own=sample.tolist(), top=_SAMPLE_TOP)
        for name, (one, other) in pairs.items()
        if one in rankings and other in rankings
    }


def _folder(base: Path, paths: str, content: str) -> Path:
    """The folder of an index, even if its model or corpus has moved."""
    present = sorted(base.glob(f"*-{content}"))
    folder = present[0] if present else base / f"{paths}-{content}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_earlier(base: Path, paths: str, folder: Path) -> None:
    for other in base.glob(f"{paths}-*"):
        if other != folder and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to an index, if the file system supports locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(PermissionError):  # if this user may only read the folder
            lock = stack.enter_context((folder / _LOCK).open("a"))
            if HAS_LOCKS:
                _wait_for(lock, folder)
        yield


def _wait_for(lock: Any, folder: Path) -> None:
    try:
        lock_file(lock)
    except BlockingIOError:
        say(f"another process is writing the index in {folder}; waiting until it ends")
        lock_file(lock, wait=True)
    except OSError:  # the file system does not support locks
        return
