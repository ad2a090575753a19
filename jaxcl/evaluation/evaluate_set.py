"""Evaluates a model on an evaluation set, and prints the metrics with the size of the set."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from jaxcl.data.images.image_files import ImageFiles, naming_damaged
from jaxcl.evaluation.described import describe_environment, describe_model, json_values
from jaxcl.evaluation.differences import (
    Difference,
    difference_record,
    differences_table,
    query_difference,
)
from jaxcl.evaluation.graded import GRADED_METRICS, GradedRanks
from jaxcl.evaluation.protocol import ComparableSet, EvaluationSet, check_inputs_of_set, side_of
from jaxcl.evaluation.retrieval import METHODS
from jaxcl.evaluation.retrieval_set import MAIN_METRIC, RetrievalSet
from jaxcl.host.printable import printable
from jaxcl.host.progress import progress_bar, say, show
from jaxcl.metrics import mean_and_standard_error, paired_difference
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.host_vectors import for_inner_products
from jaxcl.typing import Float

__all__ = ["check_methods", "evaluate_set"]

_COLUMNS = (MAIN_METRIC, "mrr@10", "recall@100")


class _Evaluated(NamedTuple):
    """The results of a model on a set.

    Attributes:
      record: the return value of `evaluate_set`.
      outcome: the input of the metrics: for retrieval, the ranks by method; for other sets, what
        `ComparableSet.measure` returned, or `None`.
    """

    record: dict[str, Any]
    outcome: Any


def check_methods(
    data_set: EvaluationSet, methods: Sequence[str] | None, *, compares: bool = False
) -> None:
    """Raise a `ValueError` for methods without a retrieval set, or an impossible comparison.

    Args:
      data_set: the set.
      methods: as for `evaluate_set`.
      compares: whether two models are compared.
    """
    if methods is not None and not isinstance(data_set, RetrievalSet):
        raise ValueError(
            f"--methods chooses how documents are ranked, but this is not a retrieval set: "
            f"{data_set.description}; leave it out"
        )
    if compares and methods is not None and set(methods) == {"bm25"}:
        raise ValueError("--against compares models, but bm25 ranks without one; add dense")
    if compares and not isinstance(data_set, (RetrievalSet, ComparableSet)):
        raise ValueError(
            f"two models cannot be compared on a set of the kind {data_set.kind!r}; its class "
            "lacks the methods of jaxcl.evaluation.protocol.ComparableSet"
        )


def evaluate_set(
    model: EmbeddingModel,
    data_set: EvaluationSet,
    *,
    against: EmbeddingModel | None = None,
    methods: Sequence[str] | None = None,
    rrf_k: int | float = 10,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on an evaluation set, and print a table.

    Args:
      model: any model; it embeds texts with its own tokenizer, limits and prompts.
      data_set: a set that `jaxcl.evaluation.sets.open_set` returned.
      against: a second model, which is evaluated on the same set.
      methods: the ranking methods for a retrieval set, by default all of
        `jaxcl.evaluation.retrieval.METHODS`.
      rrf_k: the constant of reciprocal rank fusion.
      batch_size: as for `EmbeddingModel.encode`.

    Returns:
      The metrics, with a description of the model and the set. The metrics of a retrieval set are
      means and standard errors over the queries, by method. With a second model, also its
      description and metrics (`against`), and the `differences` from it, paired by query, by pair
      of texts or by image.

    Raises:
      ValueError: for methods with another kind of set, values that the model cannot embed, a
        similarity that inner products cannot express, embeddings that are not finite, or texts
        without a word for BM25.
    """
    check_methods(data_set, methods, compares=against is not None)
    models = [model] if against is None else [model, against]
    for one in models:
        check_inputs_of_set(data_set, one.modality)
        _check_similarity(one, data_set)
    if jax.process_index() == 0:
        say(data_set.description)
    methods = methods or METHODS
    options: dict[str, Any] = {"rrf_k": rrf_k, "batch_size": batch_size}
    title = None if against is None else printable(f"model: {model.source}")
    evaluation = _evaluated(model, data_set, methods=methods, title=title, **options)
    if against is None:
        return evaluation.record
    methods = [method for method in methods if method != "bm25"]  # BM25 needs no model
    title = printable(f"against: {against.source}")
    baseline = _evaluated(against, data_set, methods=methods, title=title, **options)
    described = {name: baseline.record[name] for name in (*describe_model(against), "metrics")}
    differences = _differences(data_set, evaluation.outcome, baseline.outcome)
    return {**evaluation.record, "against": described, "differences": differences}


def _check_similarity(model: EmbeddingModel, data_set: EvaluationSet) -> None:
    if data_set.kind != "retrieval" and model.similarity_function not in ("cosine", "dot"):
        raise ValueError(
            f"the model compares embeddings by {model.similarity_function!r}, but a set of the "
            f"kind {data_set.kind!r} compares them by inner products; use a model with cosine or "
            "dot similarity"
        )


def _evaluated(
    model: EmbeddingModel,
    data_set: EvaluationSet,
    *,
    methods: Sequence[str],
    rrf_k: int | float,
    batch_size: int | None,
    title: str | None,
) -> _Evaluated:
    """Evaluate a model, and print its metrics below a title."""
    encode = functools.partial(_encode, model, batch_size)
    outcome: Any = None
    if isinstance(data_set, RetrievalSet):
        outcome = data_set.rank(encode, methods=methods, rrf_k=rrf_k)
        metrics, sizes, table = _figures(outcome), data_set.sizes, _table(data_set, outcome)
    else:
        if isinstance(data_set, ComparableSet):
            outcome = data_set.measure(encode)
            values = data_set.figures(outcome)
        else:
            values = data_set.evaluate(encode)
        metrics, sizes, table = json_values(values), {}, _plain_table(values)
    if jax.process_index() == 0:
        if title is not None:
            table.title, table.title_justify = Text(title), "left"
        show(table)
    record = {
        **describe_model(model),
        "kind": data_set.kind,
        "fingerprint": data_set.fingerprint,
        "sizes": sizes,
        **describe_environment(),
        "metrics": metrics,
    }
    return _Evaluated(record, outcome)


def _differences(data_set: EvaluationSet, outcome: Any, baseline: Any) -> dict[str, Any]:
    """Compute the paired differences in the layout of the metrics, and print the main ones."""
    differences: dict[tuple[str, str], Difference]
    record: dict[str, Any] = {}
    if isinstance(data_set, RetrievalSet):
        differences = {
            (method, name): query_difference(metric(outcome[method]), metric(baseline[method]))
            for method in baseline
            for name, metric in GRADED_METRICS.items()
        }
        for (method, name), one in differences.items():
            record.setdefault(method, {})[name] = difference_record(one)
        over, shown = (
            "queries",
            {names: one for names, one in differences.items() if names[1] in _COLUMNS},
        )
    else:
        assert isinstance(data_set, ComparableSet)  # checked before the models are evaluated
        by_name = data_set.differences(outcome, baseline)
        record = {name: difference_record(one) for name, one in by_name.items()}
        over, shown = data_set.unit, {("", name): one for name, one in by_name.items()}
    if jax.process_index() == 0:
        show(differences_table(shown, over=over))
    return record


def _encode(
    model: EmbeddingModel, batch_size: int | None, inputs: str, values: Sequence[Any]
) -> Float[np.ndarray, "n d"]:
    modality = model.modality
    side = side_of(inputs, modality)
    title = f"embedding {len(values):,} {modality[side]}s of side {side}"
    with progress_bar(title, len(values)) as advance:
        options: dict[str, Any] = {"side": side, "batch_size": batch_size, "progress": advance}
        items = values.files if isinstance(values, ImageFiles) else values
        options["images" if modality[side] == "image" else "texts"] = items
        with naming_damaged(values):
            vectors = model.encode(**options)
    return for_inner_products(model.similarity_function, side, vectors)


def _figures(ranks: Mapping[str, GradedRanks]) -> dict[str, Any]:
    figures = {
        method: {
            name: _figure(*mean_and_standard_error(metric(of_method)))
            for name, metric in GRADED_METRICS.items()
        }
        for method, of_method in ranks.items()
    }
    for method in ranks:
        if method != "bm25" and "bm25" in ranks:
            difference = {MAIN_METRIC: _figure(*_difference(ranks, method))}
            figures[f"{method} - bm25"] = difference
    return figures


def _figure(mean: float, error: float) -> dict[str, float | None]:
    return json_values({"mean": mean, "standard_error": error})


def _difference(ranks: Mapping[str, GradedRanks], method: str) -> tuple[float, float]:
    metric = GRADED_METRICS[MAIN_METRIC]
    return paired_difference(metric(ranks[method]), metric(ranks["bm25"]))


def _table(data_set: RetrievalSet, ranks: Mapping[str, GradedRanks]) -> Table:
    table = Table("method", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    headings = ["queries", "documents", *_COLUMNS]
    for heading in [*headings, "vs bm25 (SEs)"] if len(ranks) > 1 and "bm25" in ranks else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    sizes = [f"{data_set.sizes[name]:,}" for name in ("queries", "documents")]
    for method, of_method in ranks.items():
        summary = [mean_and_standard_error(GRADED_METRICS[name](of_method)) for name in _COLUMNS]
        cells = ["{:.3f}±{:.3f}".format(*one).replace("0.", ".") for one in summary]
        if method != "bm25" and "bm25" in ranks:
            mean, error = _difference(ranks, method)
            cells.append(f"{mean:+.3f}" + (f" ({mean / error:+.1f})" if error > 0 else ""))
        table.add_row(method, *sizes, *cells)
    return table


def _plain_table(values: Mapping[str, float]) -> Table:
    """A table with a row per value, and with the interval or standard error of the value.

    The interval of `spearman` is from `spearman_low` to `spearman_high`; the error of `accuracy` is
    `accuracy_standard_error`.
    """
    errors = {f"{name}_standard_error" for name in values} & set(values)
    table = Table("metric", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("value", "± standard error" if errors else "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    ends = errors | {f"{name}_{end}" for name in values for end in ("low", "high")}
    for name, value in values.items():
        if name not in ends:
            figure = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            interval = [
                f"{values[end]:.4f}"
                for end in (f"{name}_low", f"{name}_high", f"{name}_standard_error")
                if end in values
            ]
            table.add_row(name, figure, " to ".join(interval))
    return table
