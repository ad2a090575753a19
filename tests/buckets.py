"""Object stores for tests: `gs://bucket/name` is a file in a local folder.

Like a real store, they have no empty folders, and cannot append to a file.
"""

import os
from pathlib import Path
from typing import ClassVar

from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

__all__ = ["Buckets", "install"]


class Buckets(LocalFileSystem):
    """The file system of `gs://`."""

    protocol = ("gs", "gcs")
    root: ClassVar[Path]
    opened: ClassVar[list[tuple[str, str]]]
    """The name and mode of each file that was opened."""

    def __init__(self, **options):
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = os.fspath(path)
        if text.startswith(str(cls.root)):
            return text.rstrip("/")
        return str(cls.root / text.split("://", 1)[-1]).rstrip("/")

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def isdir(self, path):
        folder = self._strip_protocol(path)
        return any(files for _, _, files in os.walk(folder))

    def exists(self, path, **options):
        return self.isfile(path) or self.isdir(path)

    def pipe_file(self, path, value, mode="overwrite", **options):
        with self.open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)

    def _open(self, path, mode="rb", **options):
        if not {"r", "w", "x"} & set(mode) or "+" in mode:
            raise NotImplementedError(f"an object store opens no file in mode {mode!r}")
        self.opened.append((os.path.relpath(self._strip_protocol(path), self.root), mode))
        if "r" not in mode:
            os.makedirs(self._parent(path), exist_ok=True)
        return super()._open(path, mode)


def install(monkeypatch, root: Path) -> None:
    """Let `gs://` name files below a folder, until the test ends."""
    monkeypatch.setattr(Buckets, "root", root, raising=False)
    monkeypatch.setattr(Buckets, "opened", [], raising=False)
    for name in Buckets.protocol:
        monkeypatch.setitem(_registry, name, Buckets)
