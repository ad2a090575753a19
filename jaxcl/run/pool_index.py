"""The search pool of a run's or a config's data, and its index of embedded keys and rows."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.prepare import open_sources
from jaxcl.data.row_prompts import RowPrompts
from jaxcl.data.sources import PairSource
from jaxcl.host.files import digest_of, write_npz
from jaxcl.host.npz import read_npz
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.progress import progress_bar, say
from jaxcl.host.user_folders import cache_folder, shared_folder
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.encode_rows import encode_rows
from jaxcl.run.load_model import is_run, load, model_of_run
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.settings.parts import Trust
from jaxcl.settings.sections import Settings
from jaxcl.typing import Float

__all__ = [
    "INDEX_FILE",
    "Pool",
    "PoolIndex",
    "open_run_with_data",
    "pool_index",
    "pool_of_data",
    "pool_of_run",
    "sources_of",
]

INDEX_FILE = "search_index.npz"
_CHUNK_ROWS = 4096


class Pool(NamedTuple):
    """A model and the data whose keys it searches.

    Attributes:
      model: the model that embeds queries and keys.
      sources: a function that opens the splits, and returns them with the prompts of rows that
        replace the model's prompts.
      index_file: path of the index.
      made_from: a description that identifies the content of the index, in JSON types.
      rrf_k: the constant of reciprocal rank fusion.
    """

    model: EmbeddingModel
    sources: Callable[[], tuple[Mapping[str, PairSource], Mapping[str, RowPrompts]]]
    index_file: AnyPath
    made_from: Mapping[str, Any]
    rrf_k: int


class PoolIndex(NamedTuple):
    """The index of all splits of a pool, one after another.

    Attributes:
      keys: embeddings of the keys.
      rows: texts and metadata of the rows.
    """

    keys: Float[np.ndarray, "n d"]
    rows: Sequence[dict[str, Any]]


def open_run_with_data(path: str | os.PathLike[str], *, trust: Trust = ()) -> OpenedRun:
    """Open a run whose own data are to be searched.

    Args:
      path: the workdir of a run, or one of its checkpoints.
      trust: packages from which parts named `package.module:function` may be imported.

    Raises:
      ValueError: if there is no run.
      CheckpointError: if no checkpoint can be read.
    """
    workdir = as_path(path)
    if workdir.is_dir() and not is_run(workdir):
        raise ValueError(
            f"{workdir} is not a run with its own data; name a file with --corpus, or data with a "
            "config"
        )
    return open_run(workdir, trust=trust)


def sources_of(settings: Settings) -> dict[str, PairSource]:
    """Open the splits of the data in `settings`, as a mapping from roles."""
    data_dir = shared_folder(settings.run.data_dir)
    return open_sources(settings.data, data_dir=data_dir, open_source=settings.parts.source)


def pool_of_run(run: OpenedRun) -> Pool:
    """The pool of a run and its own data.

    Raises:
      ValueError: if the run's data hold anything other than texts.
    """
    run.check_texts("jaxcl.search")
    rrf_k = run.settings.evaluation.rrf_k

    def opened() -> tuple[Mapping[str, PairSource], Mapping[str, RowPrompts]]:
        sources = run.sources()
        return sources, run.prompts(sources)

    return Pool(model_of_run(run), opened, run.workdir / INDEX_FILE, run.made_from, rrf_k)


def pool_of_data(path: str | os.PathLike[str], settings: Settings, *, trust: Trust = ()) -> Pool:
    """Open a model, and the data in `settings`.

    The index is kept in the user's cache, so that the folder of the model stays unchanged.

    Args:
      path: any model that `jaxcl.load` accepts.
      settings: the settings of the data, from `read_data_settings`.
      trust: packages from which an encoder named `package.module:function` may be imported.

    Raises:
      ValueError: if there is no model, or the data are missing.
      CheckpointError: if no checkpoint can be read.
    """
    sources = sources_of(settings)
    model = load(path, trust=trust)
    fingerprints = {role: source.fingerprint for role, source in sources.items()}
    made_from = {"model": model.made_from, "fingerprints": fingerprints}
    name = digest_of(json.dumps(made_from, sort_keys=True).encode())
    index_file = cache_folder() / "search" / f"{name}.npz"
    return Pool(model, lambda: (sources, {}), index_file, made_from, settings.evaluation.rrf_k)


def pool_index(pool: Pool) -> PoolIndex:
    """Read the index of a pool, or build it if it is missing, damaged or out of date.

    Raises:
      ValueError: if the index must be built but the data are missing.
    """
    index = _read_index(pool.index_file, pool.made_from)
    if index is None:
        index = _build_index(pool.model, *pool.sources())
        _write_index(pool.index_file, pool.made_from, index)
    return index


def _read_index(path: AnyPath, made_from: Mapping[str, Any]) -> PoolIndex | None:
    """Read an index; return `None` if it is missing, damaged, or has another model or data."""
    try:
        index = read_npz(path, ["made_from", "keys", "rows"])
        if json.loads(str(index["made_from"])) != made_from:
            return None
        keys, rows = index["keys"], json.loads(index["rows"].tobytes())
    except (ValueError, RecursionError):
        return None
    fits = keys.ndim == 2 and isinstance(rows, list) and len(keys) == len(rows)
    return PoolIndex(keys, rows) if fits else None


def _write_index(path: AnyPath, made_from: Mapping[str, Any], index: PoolIndex) -> None:
    """Write the index completely or not at all; a failure is reported, but is not an error."""
    text = json.dumps(index.rows, ensure_ascii=False, default=_plain).encode()
    try:
        write_npz(
            path,
            keys=index.keys,
            rows=np.frombuffer(text, np.uint8),
            made_from=np.array(json.dumps(made_from)),
        )
    except OSError as error:
        say(f"cannot write {path} ({error.strerror}); the next search will embed the pool again")


def _plain(value: Any) -> Any:
    """Convert a value without a JSON type: NumPy's scalars to numbers, anything else to text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _build_index(
    model: EmbeddingModel, sources: Mapping[str, PairSource], prompts: Mapping[str, RowPrompts]
) -> PoolIndex:
    rows: list[dict[str, Any]] = []
    ends = [0]
    for source in sources.values():
        for first in range(0, len(source), _CHUNK_ROWS):
            rows += source.read(np.arange(first, min(first + _CHUNK_ROWS, len(source))))
        ends.append(len(rows))
    texts = [row["key"] for row in rows]
    with progress_bar("embedding the pool", len(rows)) as advance:
        if not prompts:  # all splits at once, since sorting more texts by length saves padding
            return PoolIndex(model.encode(texts, side="key", progress=advance), rows)
        keys = [
            encode_rows(
                model, texts[first:end], side="key", prompts=prompts.get(split), progress=advance
            )
            for split, (first, end) in zip(sources, itertools.pairwise(ends), strict=True)
        ]
    return PoolIndex(np.concatenate(keys), rows)
