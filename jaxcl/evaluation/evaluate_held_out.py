"""Evaluates any model on held-out rows, alone or against another model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.text import Text

from jaxcl.data.row_prompts import RowPrompts
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.described import describe_model, json_values
from jaxcl.evaluation.differences import (
    Difference,
    difference_record,
    differences_table,
    query_difference,
)
from jaxcl.evaluation.held_out import (
    HELD_OUT,
    HeldOutVectors,
    Results,
    evaluate_splits,
    held_out_summary,
)
from jaxcl.evaluation.known_positives import read_groups
from jaxcl.evaluation.labelled import RowValues
from jaxcl.evaluation.retrieval import METRICS
from jaxcl.evaluation.retrieval_table import results_table
from jaxcl.host.printable import printable
from jaxcl.host.progress import progress_bar, show
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.encode_rows import encode_rows
from jaxcl.run.host_vectors import for_inner_products
from jaxcl.settings.sections import Settings
from jaxcl.typing import Float, Int

__all__ = ["Contender", "evaluate_model"]

_WITHOUT_MODEL = ("bm25", "pixels")
_COLUMNS = ("mrr@10", "recall@1", "recall@10")


class Contender(NamedTuple):
    """A model that is evaluated on held-out rows.

    Attributes:
      model: any model; it embeds texts with its own tokenizer, limits and prompts.
      prompts: role -> prompts of that split's rows, which replace the model's prompts. Set only for
        a run's model on the run's own rows.
    """

    model: EmbeddingModel
    prompts: Mapping[str, RowPrompts] = {}


def evaluate_model(
    settings: Settings,
    contender: Contender,
    sources: Mapping[str, PairSource],
    *,
    against: Contender | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on held-out splits as `evaluate_run` does, and print a table.

    Args:
      settings: the settings; only `data` and `evaluation` are used.
      contender: the model.
      sources: role -> the pairs of texts of its split.
      against: a second model, which is evaluated on the same rows.
      batch_size: as for `EmbeddingModel.encode`.

    Returns:
      Means and standard errors, with a description of the model and the data. With a second model,
      also its description and metrics (`against`), and the `differences` from it.

    Raises:
      ValueError: if there is no held-out split, or a method fails; the table of the other methods
        is printed first.
    """
    if not set(HELD_OUT) & set(sources):
        raise ValueError(
            f"the data have only the splits {', '.join(sources)}; add {' or '.join(HELD_OUT)} to "
            "data.splits"
        )
    title = None if against is None else f"model: {contender.model.source}"
    results = _results(settings, contender, sources, batch_size, title=title)
    summary = {**describe_model(contender.model), **held_out_summary(sources, results)}
    if against is None:
        return json_values(summary)
    title = f"against: {against.model.source}"
    baseline = _results(settings, against, sources, batch_size, title=title)
    described = describe_model(against.model)
    summary["against"] = described | {"metrics": held_out_summary(sources, baseline)["metrics"]}
    summary["differences"] = _differences(results, baseline)
    return json_values(summary)


def _results(
    settings: Settings,
    contender: Contender,
    sources: Mapping[str, PairSource],
    batch_size: int | None,
    *,
    title: str | None,
) -> Results:
    """Compute the ranks by all methods, and print them below a title."""
    model, prompts = contender

    def of_texts(split: str, side: str, texts: Sequence[Any]) -> Float[np.ndarray, "n d"]:
        title = f"embedding {len(texts):,} of side {side}"
        with progress_bar(title, len(texts)) as advance:
            options: dict[str, Any] = {"batch_size": batch_size, "progress": advance}
            if model.modality[side] == "image":
                vectors = model.encode(**{"images": texts, "side": side, **options})
            else:
                own = prompts.get(split)
                vectors = encode_rows(model, texts, side=side, prompts=own, **options)
        return for_inner_products(model.similarity_function, side, vectors)

    def of_rows(split: str, side: str) -> Float[np.ndarray, "n d"]:
        rows = RowValues(sources[split], side, np.arange(len(sources[split])))
        return of_texts(split, side, rows if model.modality[side] == "image" else list(rows))

    def groups(split: str) -> Int[np.ndarray, " n"]:
        return read_groups(sources[split])

    held_out = HeldOutVectors(of_rows, of_texts, groups)
    results, failures = evaluate_splits(settings, held_out, sources)
    if jax.process_index() == 0 and results:
        table = results_table(results)
        if title is not None:
            table.title, table.title_justify = Text(printable(title)), "left"
        show(table)
    if failures:
        raise failures[0]
    return results


def _differences(results: Results, against: Results) -> dict[str, Any]:
    """Compute and print the differences of all metrics, by split, variant and method."""
    record: dict[str, Any] = {}
    for (split, variant), by_method in results.items():
        differences: dict[tuple[str, str], Difference] = {
            (method, name): query_difference(
                metric(result.ranks), metric(against[split, variant][method].ranks)
            )
            for method, result in by_method.items()
            if method not in _WITHOUT_MODEL
            for name, metric in METRICS.items()
        }
        of_variant = record.setdefault(split, {}).setdefault(variant, {})
        for (method, name), one in differences.items():
            of_variant.setdefault(method, {})[name] = difference_record(one)
        if jax.process_index() == 0:
            shown = {names: one for names, one in differences.items() if names[1] in _COLUMNS}
            show(differences_table(shown, over="queries", title=f"{split}, {variant}"))
    return record
