"""The interface that `mteb.evaluate` needs from the models of `jaxcl.load`.

    import jaxcl, mteb

    model = jaxcl.load("runs/code_search")
    mteb.evaluate(model, mteb.get_tasks(["STSBenchmark", "SciFact"]))

Results are stored under the name of the model's folder, and under a revision that changes with the
parameters, tokenizer and prompts. jaxcl does not depend on `mteb`, and imports it only for the
description of a model. `mteb` calls models by duck typing (`mteb.models.EncoderProtocol` of
version 2).
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxcl.host.files import digest_of
from jaxcl.run.host_vectors import pairwise_similarities

__all__ = ["MtebEncoder", "encodes_for_mteb"]

_SIDES = {None: "query", "query": "query", "document": "key"}
"""The side for each type of prompt in mteb. Symmetric tasks have no type."""

Method = TypeVar("Method", bound=Callable[..., Any])


class MtebEncoder:
    """The methods that `mteb` needs from a model in addition to `encode` and `similarity`.

    Attributes:
      source: folder from which the model was loaded.
      dim: number of dimensions of the embeddings.
      max_tokens: the largest length of a text in tokens, by side; `None` means no limit.
      prompts: prompts by name.
      similarity_function: a name in `SIMILARITIES`.
    """

    source: str
    dim: int
    max_tokens: Mapping[str, int | None]
    prompts: Mapping[str, str]
    similarity_function: str

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """A description that identifies the model, in JSON types; subclasses define it."""
        raise NotImplementedError

    def similarity_pairwise(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare each row of `a` with the same row of `b`, as `similarity` does.

        Args:
          a: `[n, d]`, float or int8.
          b: `[n, d]`, float or int8.

        Returns:
          Similarities `[n]` in float32.
        """
        return pairwise_similarities(self.similarity_function, a, b)

    @functools.cached_property
    def mteb_model_meta(self) -> Any:
        """The description of the model for `mteb`, a `ModelMeta`.

        Assign a copy to store results under another name:

            meta = model.mteb_model_meta
            model.mteb_model_meta = meta.model_copy(update={"name": "me/code-search"})
        """
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ImportError as error:
            raise ImportError("mteb_model_meta needs mteb: pip install 'jaxcl[mteb]'") from error
        limits = [limit for limit in self.max_tokens.values() if limit is not None]
        description = json.dumps(self.made_from, sort_keys=True)
        return ModelMeta.create_empty(
            {
                # mteb expects the names of an organisation and a model.
                "name": f"jaxcl/{Path(os.path.abspath(self.source)).name}",
                "revision": digest_of(description.encode())[:12],
                "embed_dim": self.dim,
                "max_tokens": max(limits, default=None),
                "framework": ["JAX"],
                "similarity_fn_name": ScoringFunction(self.similarity_function),
                "use_instructions": any(self.prompts.values()),
            }
        )


def encodes_for_mteb(encode: Method) -> Method:
    """Let the `encode` of an `MtebEncoder` also accept the arguments that `mteb` passes.

    `mteb` passes batches of records instead of texts, and the task. The queries of a retrieval task
    are embedded as the side `"query"`, its documents as `"key"`, and the texts of all other tasks
    as `"query"`. A prompt for the task replaces the prompt of the side; as in
    sentence-transformers, it is the first one named `TASK-query`, `TASK`, `TYPE-query` or `TYPE`.
    """

    @functools.wraps(encode)
    def encode_texts_or_batches(
        self: MtebEncoder, texts: Any = None, *, task_metadata: Any = None, **options: Any
    ) -> np.ndarray:
        if task_metadata is None:
            return encode(self, texts, **options)
        return encode(self, **_arguments(self.prompts, texts, task_metadata, **options))

    return encode_texts_or_batches  # type: ignore[return-value] # mteb passes more arguments


def _arguments(
    prompts: Mapping[str, str],
    inputs: Iterable[Mapping[str, Any]],
    task_metadata: Any,
    *,
    hf_split: str,
    hf_subset: str,
    prompt_type: Any = None,
    batch_size: int | None = None,
    show_progress_bar: bool | None = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """Convert the arguments that `mteb` passes to arguments of `EmbeddingModel.encode`."""
    if precision != "float32":
        raise ValueError(f"precision={precision!r} is not supported in mteb; leave it out")
    kind = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
    texts: list[str] = []
    for batch in inputs:
        if "text" not in batch:
            raise ValueError(
                f"{task_metadata.name} has inputs of {', '.join(batch)}; the model embeds texts"
            )
        texts += batch["text"]
    names = [
        name if suffix is None else f"{name}-{suffix}"
        for name in (task_metadata.name, task_metadata.type)
        for suffix in ((None,) if kind is None else (kind, None))
    ]
    return {
        "texts": texts,
        "side": _SIDES[kind],
        "prompt": next((prompts[name] for name in names if name in prompts), None),
        "batch_size": batch_size,
        "progress": show_progress_bar,
    }
