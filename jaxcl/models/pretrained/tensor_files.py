"""Read safetensors files by memory mapping, and write them atomically.

Files are untrusted, so the whole header is checked before any tensor is mapped: each tensor must
have the number of bytes that its type and shape need, and the tensors must fill the file without
gaps or overlaps. Nothing is unpickled.
"""

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from jaxcl.host.files import is_remote, open_regular, read_regular, replacing, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.models.pretrained.containment import join, path_inside

__all__ = [
    "TENSOR_TYPES",
    "Specs",
    "map_tensors",
    "parse_specs",
    "read_specs",
    "specs_as_json",
    "weight_files",
    "write_tensors",
]

Specs: TypeAlias = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""Name of a tensor -> its type and shape."""

TENSOR_TYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Supported tensor type in a file -> its NumPy type."""

_MAX_HEADER_BYTES = 16 * 2**20
"""The size limit, enough for 100,000 tensors; a large encoder's header takes 50,000 bytes."""
_MAX_DIMENSIONS = 16
_MAX_INDEX_BYTES = 16 * 2**20
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class _Entry(NamedTuple):
    """A tensor in a header; `begin` and `end` are byte offsets from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_specs(path: AnyPath) -> Specs:
    """Read the types and shapes of a file's tensors from its header.

    Raises:
      ValueError: if the file is not a valid safetensors file; the message names the file.
      OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        entries, _ = _read_header(file, path)
    return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}


def map_tensors(path: AnyPath) -> dict[str, np.ndarray]:
    """Map the tensors of a file as read-only views, without copies.

    A file on an object store is read into memory instead.

    Raises:
      ValueError: if the file is not a valid safetensors file; the message names the file.
      OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        entries, begin = _read_header(file, path)
        if is_remote(path):
            content = np.frombuffer(file.read(), np.uint8)
        else:
            content = np.memmap(file, np.uint8, "r").view(np.ndarray)[begin:]
    return {
        name: content[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)
        for name, entry in entries.items()
    }


def specs_as_json(tensors: Mapping[str, Specs]) -> dict[str, Any]:
    """File -> name of a tensor -> its type and shape, as `parse_specs` reads them."""
    names = {dtype: name for name, dtype in TENSOR_TYPES.items()}
    return {
        file: {name: [names[dtype], list(shape)] for name, (dtype, shape) in specs.items()}
        for file, specs in tensors.items()
    }


def parse_specs(content: Any) -> dict[str, Specs]:
    """Parse the types and shapes that `specs_as_json` wrote.

    Raises:
      ValueError: for anything else.
    """
    try:
        return {
            file: {name: _parse_spec(*spec) for name, spec in specs.items()}
            for file, specs in content.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its list of tensors is damaged ({error!r})") from error


def _parse_spec(kind: Any, shape: Any) -> tuple[np.dtype, tuple[int, ...]]:
    if not _are_sizes(shape, most=_MAX_DIMENSIONS):
        raise ValueError(f"a tensor has the shape {shape!r:.99}")
    return TENSOR_TYPES[kind], tuple(shape)


def write_tensors(path: AnyPath, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file that transformers can load, completely or not at all.

    Args:
      path: the file; an existing one is replaced.
      tensors: name -> tensor of one of `TENSOR_TYPES`.

    Raises:
      ValueError: for a tensor of any other type.
      OSError: if the file cannot be written; the message names it.
    """
    from safetensors.numpy import save, save_file

    names = {dtype: name for name, dtype in TENSOR_TYPES.items()}
    if others := {name: t.dtype for name, t in tensors.items() if t.dtype not in names}:
        raise ValueError(
            f"{path} cannot hold {others}; convert them to {', '.join(map(str, names))}"
        )
    # The package ignores strides: it would write a transposed view untransposed.
    dense = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    metadata = {"format": "pt"}  # older versions of transformers require it
    if is_remote(path):
        write_whole(path, save(dense, metadata))
        return
    with replacing(path) as file:
        save_file(dense, file.name, metadata)


def weight_files(root: AnyPath, folder: str) -> dict[str, Specs]:
    """List the files that hold the weights of a model or module, with their tensors.

    Args:
      root: the model's folder.
      folder: the module's folder, relative to `root`; `""` for `root` itself.

    Returns:
      File, relative to `root` -> its tensors: one file, or all shards in the order of their names.

    Raises:
      ValueError: if there are no safetensors files, a header is damaged, or the index does not
        match the shards.
      OSError: if a file cannot be read.
    """
    if path_inside(root, join(folder, _WEIGHTS)).exists():
        files: Iterable[str] = [_WEIGHTS]
        index = None
    elif path_inside(root, join(folder, _INDEX)).exists():
        index = _read_index(path_inside(root, join(folder, _INDEX)))
        files = sorted(set(index.values()))
    else:
        raise _without_weights(root / folder)
    specs = {}
    for file in files:
        path = path_inside(root, join(folder, file))
        if not path.exists():
            raise ValueError(f"{path} is missing, but {_INDEX} names it; download the folder again")
        specs[join(folder, file)] = read_specs(path)
    if index is not None:
        _check_index(root, {name: join(folder, file) for name, file in index.items()}, specs)
    return specs


def _read_header(file: io.IOBase, path: AnyPath) -> tuple[dict[str, _Entry], int]:
    """Read the entries of a header, and the position where the tensors begin."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header claims {length:,} bytes, but the file has {size:,}")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, more than {_MAX_HEADER_BYTES:,}")
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
        _check_offsets(entries, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}); download it again"
        ) from error
    return entries, 8 + length


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"it has {', '.join(map(repr, repeated))} twice")
    return dict(pairs)


def _parse_entry(name: str, entry: Any) -> _Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.99} must have a type, a shape and offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in TENSOR_TYPES:
        raise ValueError(
            f"{name!r:.99} has the type {kind!r}; supported are {', '.join(TENSOR_TYPES)}"
        )
    if not _are_sizes(shape, most=_MAX_DIMENSIONS):
        raise ValueError(f"{name!r:.99} has the shape {shape!r:.99}")
    if not _are_sizes(offsets, most=2) or len(offsets) != 2:
        raise ValueError(f"{name!r:.99} has the offsets {offsets!r:.99}")
    dtype, (begin, end) = TENSOR_TYPES[kind], offsets
    # NumPy multiplies the nonzero sizes even if one size is 0; no type has more than 8 bytes.
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"{name!r:.99} has the shape {shape}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name!r:.99} of type {kind} and shape {shape} has {end - begin:,} bytes")
    return _Entry(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any, *, most: int) -> bool:
    """Whether `values` is a list of at most `most` sizes, in bytes or elements."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**60 for value in values)
    )


def _check_offsets(entries: Mapping[str, _Entry], num_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            raise ValueError(f"{name!r:.99} begins at {entry.begin:,}, not at {end:,}")
        end = entry.end
    if end != num_bytes:
        raise ValueError(f"its tensors have {end:,} bytes, but the file has {num_bytes:,} for them")


def _read_index(path: AnyPath) -> dict[str, str]:
    """Name of a tensor -> the shard that holds it."""
    try:
        content = json.loads(read_regular(path, limit=_MAX_INDEX_BYTES).decode())
        shards = content["weight_map"]
        for shard in shards.values():
            if PurePosixPath(shard).name != shard:
                raise ValueError(f"{shard!r:.99} is not the name of a file in the same folder")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not map tensors to files ({error}); download it again"
        ) from error
    return shards


def _check_index(root: AnyPath, index: Mapping[str, str], specs: Mapping[str, Specs]) -> None:
    """Compare the index with the tensors that its shards hold."""
    listed = set(index.items())
    present = {(name, file) for file, tensors in specs.items() for name in tensors}
    if missing := sorted(listed - present):
        raise ValueError(f"{root} lacks tensors that {_INDEX} lists: {_pairs(missing)}")
    if unlisted := sorted(present - listed):
        raise ValueError(f"{root} holds tensors that {_INDEX} does not list: {_pairs(unlisted)}")


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} in {file}" for name, file in pairs[:10])


def _without_weights(folder: AnyPath) -> ValueError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return ValueError(
            f"{folder} has its weights in {', '.join(pickles)} only; a pickle can run code when it "
            "is read. If you trust it, load it with transformers and save it as safetensors with "
            "save_pretrained"
        )
    return ValueError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}; download the whole model")
