"""Encoders of texts and images on the available devices: texts or images in, embeddings out."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxcl.data.text_rule import UNLIMITED, TextRule, TextTokenizer
from jaxcl.data.tokenizer import check_texts, tokenizer_fingerprint
from jaxcl.host.progress import progress_bar
from jaxcl.models import Encode
from jaxcl.ops.mesh import current_mesh
from jaxcl.run.checkpoint import checksum
from jaxcl.run.host_vectors import check_quantize, quantized, similarities, truncated
from jaxcl.run.image_batches import Images, ImageSide, as_sequence, chosen, is_one_image
from jaxcl.run.mteb_encoder import MtebEncoder, encodes_for_mteb
from jaxcl.step.embedder import make_forward
from jaxcl.step.length_batches import LengthBatch, embed_batches, length_batches
from jaxcl.typing import SIDES, Float, Int, PyTree

__all__ = ["EmbeddingModel"]

_CHUNK_TEXTS = 4096
_BATCH_TOKENS = {"cpu": 2048}  # caches are small; accelerators want many rows at once
_ACCELERATOR_TOKENS = 65_536
_BAR_ROWS = 1000
"""The least number of texts or images for which `encode` shows a progress bar on a terminal."""


class EmbeddingModel(MtebEncoder):
    """A model that embeds texts, images or both, as returned by `jaxcl.load`.

    `mteb.evaluate` accepts it too (`jaxcl.run.mteb_encoder`).

    Example:
      model = jaxcl.load("runs/code_search")
      queries = model.encode(["parse an ISO date"])
      keys = model.encode(["def parse_iso_date(text): ...", "def open_socket(): ..."], side="key")
      model.similarity(queries, keys)  # [1, 2]

    A model of images and texts, such as CLIP, embeds both in the same space:

      model = jaxcl.load("models/clip-vit-base-patch32")
      images = model.encode(images=["cat.jpg", "dog.jpg"])
      model.similarity(images, model.encode(["a photo of a cat"]))  # [2, 1]

    Attributes:
      source: folder from which the model was loaded.
      dim: number of dimensions of the embeddings.
      max_tokens: side -> the maximum length of a text, in tokens, with special tokens and prompt;
        longer texts are truncated. `None` means no limit. If both sides share a fine-tuned encoder,
        both have the larger of the run's two limits. Sides of images have no entry.
      prompts: prompts by name. `encode` uses `"query"` and `"key"` by default. A folder of
        sentence-transformers may have others. The model of a run has the prompts of `data.prompts`;
        for texts like those of a data set in `data.concatenated`, pass its prompt to `encode`.
      normalizes: whether the embeddings are unit vectors.
      matryoshka_dims: dimensions to which embeddings were truncated in training; empty if unknown.
      similarity_function: `"cosine"`, `"dot"`, `"euclidean"` or `"manhattan"`.
      modality: the modality of each side, `"text"` or `"image"`.
    """

    def __init__(
        self,
        *,
        source: str,
        encode: Encode,
        params: PyTree,
        mesh: Mesh,
        dim: int,
        tokenizer: Tokenizer | None = None,
        rules: Mapping[str, TextRule] | None = None,
        images: Mapping[str, ImageSide] | None = None,
        prompts: Mapping[str, str] | None = None,
        normalizes: bool = True,
        similarity_function: str = "cosine",
        matryoshka_dims: Sequence[int] = (),
        description: Mapping[str, Any] | None = None,
    ):
        rules = rules or {}
        self.source = source
        self.dim = dim
        self.max_tokens = {
            side: None if rule.max_tokens == UNLIMITED else rule.max_tokens
            for side, rule in rules.items()
        }
        self.prompts = {**(prompts or {}), **{side: rule.prompt for side, rule in rules.items()}}
        self.normalizes = normalizes
        self.similarity_function = similarity_function
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.modality = {side: "image" if side in (images or {}) else "text" for side in SIDES}
        self._description = description or {}
        self._params = params
        self._mesh = mesh
        self._tokenizer = tokenizer
        self._rules = rules
        self._images = images or {}
        if tokenizer is not None:
            # Few, because a tokenizer with its vocabulary is large. Programs use few prompts.
            self._text = functools.lru_cache(maxsize=16)(
                functools.partial(TextTokenizer, tokenizer)
            )
        self._forward = make_forward(encode, mesh)

    def __repr__(self) -> str:
        return f"EmbeddingModel({self.source!r}, dim={self.dim})"

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """A description of the model in JSON types; equal descriptions mean equal embeddings."""
        with current_mesh(self._mesh):
            checksums = [int(checksum(leaf)) for leaf in jax.tree.leaves(self._params)]
        return {
            **self._description,
            "parameters": checksums,
            **({"tokenizer": tokenizer_fingerprint(self._tokenizer)} if self._tokenizer else {}),
            "rules": {side: rule._asdict() for side, rule in self._rules.items()},
            **(
                {"images": {side: one.description for side, one in self._images.items()}}
                if self._images
                else {}
            ),
        }

    @encodes_for_mteb
    def encode(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        images: Images | None = None,
        side: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        dim: int | None = None,
        quantize: str | None = None,
        progress: bool | Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Embed texts or images.

        Texts are sorted by length and padded to a few widths, which wastes little work on padding
        and compiles few programs. An embedding depends only on its text, up to rounding. With
        several processes, every process must pass the same texts, and gets all embeddings. Images
        are decoded in worker threads, one batch ahead of the devices.

        Args:
          texts: one text, or several.
          images: instead of texts, one image or several: paths, image files as `bytes`, PIL images,
            or uint8 arrays `[h, w, 3]`; also one array `[n, h, w, 3]`.
          side: `"query"` or `"key"`; documents, passages and code are keys. It selects the prompt
            and, for models with two encoders, the encoder. By default, the query side if it reads
            texts or images, whichever are given, and the key side otherwise.
          prompt: replaces the side's prompt: a name in `prompts`, or the prompt itself; `""` for no
            prompt.
          batch_size: number of rows per batch, rounded up to a multiple of the number of devices;
            by default, about 2,048 tokens or patches on a CPU, and about 65,536 on an accelerator.
          dim: number of leading dimensions to keep, for models trained with
            `loss.matryoshka_dims`. Unit vectors are normalised again.
          quantize: `"int8"` multiplies the values of unit vectors by 127 and rounds them. It uses
            no per-dimension ranges, so that embeddings of different calls can be compared.
            `"binary"` keeps one bit per dimension, 1 for positive values, with the first of eight
            dimensions in the highest bit of a byte, like `"ubinary"` in sentence-transformers.
          progress: whether to show a progress bar, or a function that is called with the number of
            finished rows; by default, long calls show a bar on a terminal.

        Returns:
          Embeddings `[n, d]` in the order of the rows, or `[d]` for one text or image, in float32.
          With `"int8"`, their type is int8; with `"binary"`, each has `ceil(d / 8)` values of
          uint8.

        Raises:
          TypeError: if a text is not a `str`, or not exactly one of texts and images is given.
          ValueError: for a text that is not Unicode, an image that cannot be decoded, an unknown
            side or option, or a side that does not read texts or images, whichever are given.
        """
        if (texts is None) == (images is None):
            raise TypeError("give either texts or images=…")
        check_quantize(quantize, normalizes=self.normalizes)
        if dim is not None and not 1 <= dim <= self.dim:
            raise ValueError(f"dim={dim} is out of range; the model has dimensions 1 to {self.dim}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is out of range; give 1 or more")
        if texts is not None:
            side = self._side(side, "text")
            text = self._text_of(side, prompt)
            rows = self._tokenize(texts, text)
            with _shown(progress, len(rows)) as advance:
                vectors = self._embed(rows, side, text, batch_size, advance)
            one = isinstance(texts, str)
        else:
            assert images is not None
            if prompt is not None:
                raise ValueError(f"prompt={prompt!r} has no effect on images; leave it out")
            values = as_sequence(images)
            with _shown(progress, len(values)) as advance:
                vectors = self._embed_images(values, self._side(side, "image"), batch_size, advance)
            one = is_one_image(images)
        vectors = quantized(truncated(vectors, dim, normalizes=self.normalizes), quantize)
        return vectors[0] if one else vectors

    def tokenize(
        self, texts: str | Sequence[str], *, side: str | None = None, prompt: str | None = None
    ) -> Int[np.ndarray, " _"] | list[Int[np.ndarray, " _"]]:
        """Compute the token ids that the encoder reads, without padding.

        Args:
          texts: one text, or several.
          side, prompt: as for `encode`.

        Returns:
          Ids `[t]` for each text, with the prompt's tokens and special tokens.
        """
        rows = self._tokenize(texts, self._text_of(self._side(side, "text"), prompt))
        return rows[0] if isinstance(texts, str) else rows

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare embeddings with the model's similarity function; higher is more similar.

        Args:
          a: `[n, d]`, or `[d]`; float or int8.
          b: `[m, d]`, or `[d]`.

        Returns:
          Similarities `[n, m]` in float32, without the axis of a single vector. `"cosine"` and
          `"dot"` are summed in float64; `"euclidean"` and `"manhattan"` are negative distances.
        """
        return similarities(self.similarity_function, a, b)

    def _side(self, side: str | None, modality: str) -> str:
        """The given side if it reads the modality; by default, the first side that does."""
        if side is not None and side not in SIDES:
            raise ValueError(f"side={side!r} is unknown; use {' or '.join(SIDES)}")
        present = self._rules if modality == "text" else self._images
        sides = [one for one in SIDES if one in present]
        if not sides:
            raise ValueError(f"{self.source} has no encoder of {modality}s")
        if side is not None and side not in sides:
            other = "images" if modality == "text" else "texts"
            raise ValueError(f"side={side!r} reads {other}; {modality}s have side={sides[0]!r}")
        return side or sides[0]

    def _text_of(self, side: str, prompt: str | None) -> TextTokenizer:
        rule = self._rules[side]
        if prompt is not None:
            rule = rule._replace(prompt=self.prompts.get(prompt, prompt))
        return self._text(rule)

    def _tokenize(
        self, texts: str | Sequence[str], text: TextTokenizer
    ) -> list[Int[np.ndarray, " _"]]:
        texts = _checked([texts] if isinstance(texts, str) else texts)
        return [
            row
            for first in range(0, len(texts), _CHUNK_TEXTS)
            for row in text.tokenize(texts[first : first + _CHUNK_TEXTS])
        ]

    def _embed(
        self,
        rows: Sequence[Int[np.ndarray, " _"]],
        side: str,
        text: TextTokenizer,
        batch_size: int | None,
        advance: Callable[[int], object],
    ) -> Float[np.ndarray, "n d"]:
        # Equal texts are embedded once, which also gives them bitwise equal embeddings.
        numbers: dict[bytes, int] = {}
        number_of_row = [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]
        distinct = [np.frombuffer(content, np.int32) for content in numbers]
        copies = np.bincount(number_of_row, minlength=len(distinct))
        lengths = [len(row) for row in distinct]
        batches = self._batches(lengths, batch_size, longest=self.max_tokens[side])

        def read(batch: LengthBatch) -> PyTree:
            padding = [distinct[0][:0]] * (batch.num_rows - len(batch.rows))
            return text.inputs([distinct[row] for row in batch.rows] + padding, batch.width)

        vectors = np.empty((len(distinct), self.dim), np.float32)
        embed_batches(
            batches,
            functools.partial(self._forward, self._params, side),
            read,
            vectors,
            advance=lambda done: advance(int(copies[done].sum())),
        )
        return vectors if len(distinct) == len(rows) else vectors[number_of_row]

    def _embed_images(
        self,
        values: Sequence[Any],
        side: str,
        batch_size: int | None,
        advance: Callable[[int], object],
    ) -> Float[np.ndarray, "n d"]:
        images = self._images[side]

        def read(batch: LengthBatch) -> PyTree:
            inputs = images.read(chosen(values, batch.rows))
            missing = batch.num_rows - len(batch.rows)
            return jax.tree.map(
                lambda leaf: np.pad(leaf, ((0, missing), *[(0, 0)] * (leaf.ndim - 1))), inputs
            )

        vectors = np.empty((len(values), self.dim), np.float32)
        embed_batches(
            self._batches([images.length] * len(values), batch_size, longest=images.length),
            functools.partial(self._forward, self._params, side),
            read,
            vectors,
            advance=lambda done: advance(len(done)),
        )
        return vectors

    def _batches(
        self, lengths: Sequence[int], batch_size: int | None, *, longest: int | None
    ) -> Iterator[LengthBatch]:
        platform = self._mesh.devices.flat[0].platform
        return length_batches(
            np.array(lengths, np.int64),
            multiple=self._mesh.size,
            batch_tokens=_BATCH_TOKENS.get(platform, _ACCELERATOR_TOKENS) * self._mesh.size,
            batch_size=batch_size,
            longest=longest,
        )


def _checked(texts: Sequence[str]) -> list[str]:
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {number} is {type(text).__name__}, {text!r:.80}; give a str")
    check_texts(texts, what="text")
    return texts


@contextlib.contextmanager
def _shown(
    progress: bool | Callable[[int], object] | None, num_rows: int
) -> Iterator[Callable[[int], object]]:
    if progress is None:
        progress = num_rows >= _BAR_ROWS and sys.stderr is not None and sys.stderr.isatty()
    if callable(progress):
        yield progress
    elif progress:
        with progress_bar("embedding", num_rows) as advance:
            yield advance
    else:
        yield lambda rows: None
