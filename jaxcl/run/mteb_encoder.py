"""What `mteb` needs of a model, so that `mteb.evaluate` accepts the models of `jaxcl.load`.

    import jaxcl, mteb

    model = jaxcl.load("runs/code_search")
    mteb.evaluate(model, mteb.get_tasks(["STSBenchmark", "SciFact"]))

Results are stored under the name of the model's folder, and under a revision that changes with its
parameters, tokenizer and prompts. `mteb` is imported when it asks for this description, so it is no
dependency. It calls models by duck typing (`mteb.models.EncoderProtocol`, versions 2).
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
"""Type of a prompt in mteb -> side. Tasks that compare like with like have no type."""

Method = TypeVar("Method", bound=Callable[..., Any])


class MtebEncoder:
    """Adds to a model what `mteb` needs next to `encode` and `similarity`.

    Attributes:
      source: the folder that the model was loaded from.
      dim: the width of the embeddings.
      max_tokens: side -> the longest text in tokens; `None` without a limit.
      prompts: name -> prompt.
      similarity_function: a name in `SIMILARITIES`.
    """

    source: str
    dim: int
    max_tokens: Mapping[str, int | None]
    prompts: Mapping[str, str]
    similarity_function: str

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Identifies the model in JSON types; each class of models has its own."""
        raise NotImplementedError

    def similarity_pairwise(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare each row of `a` with the same row of `b`, as `similarity` does.

        Args:
          a: `[n, d]`, float or int8.
          b: of the same shape.

        Returns:
          `[n]` in float32.
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
                # Names of mteb are those of an organisation and a model.
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
    """Let the `encode` of an `MtebEncoder` also take the arguments that `mteb` calls it with.

    `mteb` passes batches of records instead of texts, and the task. Queries of a retrieval are
    embedded on the side `"query"`, documents on `"key"`, and the texts of all other tasks on
    `"query"`. Where the model has a prompt for the task, it replaces that of the side; its name is,
    in order, `TASK-query`, `TASK`, `TYPE-query` or `TYPE`, as for models of sentence-transformers.
    """

    @functools.wraps(encode)
    def encode_texts_or_batches(
        self: MtebEncoder, texts: Any, *, task_metadata: Any = None, **options: Any
    ) -> np.ndarray:
        if task_metadata is None:
            return encode(self, texts, **options)
        return encode(self, **_arguments(self.prompts, texts, task_metadata, **options))

    return encode_texts_or_batches  # type: ignore[return-value]


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
    """The arguments of `EmbeddingModel.encode` for those of `mteb`."""
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
        name if one is None else f"{name}-{one}"
        for name in (task_metadata.name, task_metadata.type)
        for one in ((None,) if kind is None else (kind, None))
    ]
    return {
        "texts": texts,
        "side": _SIDES[kind],
        "prompt": next((prompts[name] for name in names if name in prompts), None),
        "batch_size": batch_size,
        "progress": show_progress_bar,
    }
