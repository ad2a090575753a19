"""Evaluates models on held-out splits, where each row is a query with its key.

The docstring of `jaxcl.evaluation.retrieval` says when not to trust the metrics. In code search,
`validation` has unseen files of packages whose other files are in the training split, and is
therefore the easier split; `test` has packages that training never saw.

The only relevant key of a query is the key of its row. Keys of other rows with the same query, and
duplicates of these keys or of the relevant key, are excluded from the query's ranking.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.data.modalities import build_readers
from jaxcl.data.prepare import RunData
from jaxcl.data.row_prompts import row_prompts
from jaxcl.data.source_fields import iterate_fields
from jaxcl.data.sources import PairSource
from jaxcl.data.table import label_column
from jaxcl.evaluation.described import describe_environment, json_values
from jaxcl.evaluation.known_positives import KnownPositives, known_positives, read_numbers
from jaxcl.evaluation.pixel_baseline import PIXELS, Scorer, pixel_scorer
from jaxcl.evaluation.retrieval import (
    METRICS,
    RetrievalResult,
    comparison,
    evaluate_retrieval,
    mask_name,
)
from jaxcl.evaluation.retrieval_table import results_table
from jaxcl.host.files import write_npz, write_whole
from jaxcl.host.paths import AnyPath
from jaxcl.host.processes import PeerError, together
from jaxcl.host.progress import progress_bar, show
from jaxcl.metrics import mean_and_standard_error
from jaxcl.run.encoder import Encoder
from jaxcl.settings.derived import DIRECTIONS, ranking_directions, ranking_methods
from jaxcl.settings.sections import Settings
from jaxcl.typing import SIDES, Float, Int

__all__ = [
    "HELD_OUT",
    "HeldOutVectors",
    "Ranked",
    "Results",
    "evaluate_run",
    "evaluate_splits",
    "held_out_summary",
    "quick_metric_names",
    "quick_metrics",
    "quick_positives",
]

HELD_OUT = ("validation", "test")
_QUICK, _QUICK_METRICS = "validation/dense", ("mrr@10", "recall@10")
Results = dict[tuple[str, str], dict[str, RetrievalResult]]
"""`(split, variant)` -> method -> ranks."""


class HeldOutVectors(NamedTuple):
    """The embeddings of held-out splits.

    Attributes:
      of_rows: `(split, side)` -> embeddings of all rows.
      of_texts: `(split, side, texts)` -> embeddings of other texts, one per row, such as keys with
        masked names.
      labels: split -> a label per row, shared by rows with equal queries or equal keys, or `None`.
      groups: split -> the group of each row.
    """

    of_rows: Callable[[str, str], Float[np.ndarray, "n d"]]
    of_texts: Callable[[str, str, Sequence[str]], Float[np.ndarray, "n d"]]
    groups: Callable[[str], Int[np.ndarray, " n"]]
    labels: Callable[[str], Int[np.ndarray, " n"] | None] = lambda split: None


def quick_metric_names(data: RunData) -> list[str]:
    """The names of `quick_metrics`; for all of them, higher is better."""
    return [f"{_QUICK}/{name}" for name in _QUICK_METRICS if "validation" in data.tables]


class Ranked(NamedTuple):
    """The embeddings of a split.

    Attributes:
      queries: one per row.
      keys: one per row.
      known: the keys that answer each query.
    """

    queries: Float[np.ndarray, "n d"]
    keys: Float[np.ndarray, "n d"]
    known: KnownPositives


def quick_metrics(
    settings: Settings,
    encoder: Encoder,
    data: RunData,
    *,
    positives: Callable[[], KnownPositives] | None = None,
    look: Callable[[Ranked], None] = lambda ranked: None,
) -> dict[str, float]:
    """The metrics of dense retrieval over the validation split, for reports during training.

    Keys are ranked for queries, whatever the directions of the final evaluation.

    Args:
      settings: the settings of the run.
      encoder: the model.
      data: the data of the run.
      positives: returns the known positives; `quick_positives` computes them by default.
      look: called with the embeddings, if there is a validation split.
    """
    if "validation" not in data.tables:
        return {}
    queries, keys = (encoder.embed(side, data.tables["validation"]) for side in SIDES)
    known = quick_positives(settings, data) if positives is None else positives()
    ranks = _ranked(None, None, queries, keys, known, methods=("dense",))["dense"].ranks
    look(Ranked(queries, keys, known))
    means = {
        f"{_QUICK}/{name}": mean_and_standard_error(METRICS[name](ranks))[0]
        for name in _QUICK_METRICS
    }
    return means | {"validation/keys": len(keys)}  # the metrics depend on this number


def quick_positives(settings: Settings, data: RunData) -> KnownPositives:
    """The known positives of the validation split, for `quick_metrics`.

    They are the same in all evaluations of a run, but reading the rows takes long for images.
    """
    table, source = data.tables["validation"], data.sources["validation"]
    numbers = together(lambda: read_numbers(source, label_column(table, "text")))
    groups = label_column(table, "group") if settings.evaluation.exclude_groups else None
    return known_positives(numbers["query"], numbers["key"], groups)


def evaluate_run(
    settings: Settings,
    encoder: Encoder,
    data: RunData,
    workdir: AnyPath,
    *,
    described: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Rank the keys of every held-out query by BM25, by the model, and by both; write the results.

    The results are `results.json` (means and standard errors, and a description of the data and
    devices), `ranks.npz` (the rank of each query's key, for paired comparisons between runs), and a
    printed table. If the data have the name of each function, a second variant masks it in the key.

    Args:
      settings: the settings of the run.
      encoder: the model.
      data: the splits of the run.
      workdir: the folder for the files.
      described: additional fields of `results.json`, such as the number of steps.

    Returns:
      The content of `results.json`.

    Raises:
      ValueError: the error of the first method that failed, after the results of all others are
        written.
    """

    def of_texts(split: str, side: str, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        prompts = row_prompts(settings.data, split, data.sources[split])
        if prompts is None:
            return encoder.encode(side, texts)
        parts = []
        for number, rows in prompts.parts(0, len(texts)):
            readers = build_readers(prompts.apply(settings.data, number), workdir)
            parts.append(encoder._replace(readers=readers).encode(side, texts[rows]))
        return np.concatenate(parts)

    vectors = HeldOutVectors(
        lambda split, side: encoder.embed(side, data.tables[split]),
        of_texts,
        lambda split: label_column(data.tables[split], "group"),
        lambda split: label_column(data.tables[split], "text"),
    )
    results, failures = evaluate_splits(settings, vectors, data.sources)
    described = {"steps": settings.steps, "seed": settings.seed, **described}
    summary = json_values({**described, **held_out_summary(data.sources, results)})
    if jax.process_index() == 0:
        ranks = {
            "/".join((*names, method)): result.ranks
            for names, by_method in results.items()
            for method, result in by_method.items()
        }
        write_npz(workdir / "ranks.npz", **ranks)
        content = json.dumps(summary, indent=2, allow_nan=False)
        write_whole(workdir / "results.json", content + "\n")
        if results:
            show(results_table(results))
    if failures:
        raise failures[0]
    return summary


def evaluate_splits(
    settings: Settings, vectors: HeldOutVectors, sources: Mapping[str, PairSource]
) -> tuple[Results, list[Exception]]:
    """Rank the keys of every held-out split.

    Returns:
      The ranks by all methods that did not fail, and the errors of those that did.
    """
    results: Results = {}
    failures: list[Exception] = []
    for split in HELD_OUT:
        if split in sources:
            results |= _evaluate_split(settings, vectors, sources, split, failures)
    return results, failures


def _evaluate_split(
    settings: Settings,
    vectors: HeldOutVectors,
    sources: Mapping[str, PairSource],
    split: str,
    failures: list[Exception],
) -> Results:
    methods, source = ranking_methods(settings), sources[split]
    lexical = bool({"bm25", "hybrid"} & set(methods))
    texts = _texts(source) if lexical else dict.fromkeys(SIDES)
    numbers = together(lambda: read_numbers(source, vectors.labels(split)))
    groups = vectors.groups(split) if settings.evaluation.exclude_groups else None
    embeddings = functools.cache(functools.partial(vectors.of_rows, split))
    results: Results = {}

    def rank(variant: str, sides: Sequence[str], **replaced: Any) -> None:
        """Add the result of one direction, in which some arguments may be replaced."""
        asking, ranked = sides
        # The pixel baseline compares the original texts.
        ranking = [one for one in methods if one != PIXELS or not replaced]
        if not ranking:
            return
        arguments = {
            "query_texts": texts[asking],
            "key_texts": texts[ranked],
            "query_embeddings": embeddings(asking),
            "key_embeddings": replaced.pop("embed_keys", lambda: embeddings(ranked))(),
            "known": known_positives(numbers[asking], numbers[ranked], groups),
            "rrf_k": settings.evaluation.rrf_k,
        }
        if PIXELS in ranking:
            scorer = functools.partial(
                pixel_scorer, settings.data, sources, split, (asking, ranked)
            )
            arguments["others"] = {PIXELS: together(scorer)}
        own = len(source) / jax.process_count()
        with progress_bar(f"evaluating {split}, {variant}", round(own)) as advance:
            ranks = functools.partial(_ranked, **(arguments | replaced), advance=advance)
            results[split, variant] = _each_that_works(ranks, ranking, failures)

    for direction in ranking_directions(settings):
        sides = SIDES if direction == DIRECTIONS[0] else SIDES[::-1]
        rank(_variant(settings, sides), sides)
    if "name" in settings.data.metadata_fields and settings.data.modality.key == "text":
        masked = together(lambda: _masked_keys(source))
        rank(
            "name masked",
            SIDES,
            key_texts=masked if lexical else None,
            embed_keys=lambda: vectors.of_texts(split, "key", masked),
        )
    return results


def _variant(settings: Settings, sides: Sequence[str]) -> str:
    """The name of a direction in the results, such as "image to text"."""
    if len(set(settings.data.modality)) > 1:
        return " to ".join(getattr(settings.data.modality, side) for side in sides)
    return "plain" if sides == SIDES else "key to query"


def _texts(source: PairSource) -> dict[str, list[str] | None]:
    """The texts of all rows by side."""
    records = list(iterate_fields(source, range(len(source)), SIDES))
    return {side: [record[side] for record in records] for side in SIDES}


def _masked_keys(source: PairSource) -> list[str]:
    records = iterate_fields(source, range(len(source)), ("key", "name"))
    return [mask_name(record["key"], record["name"]) for record in records]


def _each_that_works(
    rank: Callable[..., dict[str, RetrievalResult]],
    methods: Sequence[str],
    failures: list[Exception],
) -> dict[str, RetrievalResult]:
    """Rank by all methods at once; if that fails, by each method separately, to keep the rest."""
    try:
        return rank(methods=methods)
    except (ValueError, ArithmeticError, PeerError) as error:
        if len(methods) == 1:
            failures.append(error)
            return {}
    results: dict[str, RetrievalResult] = {}
    for method in methods:
        results |= _each_that_works(rank, (method,), failures)
    return results


def _ranked(
    query_texts: Sequence[str] | None,
    key_texts: Sequence[str] | None,
    query_embeddings: Float[np.ndarray, "n d"],
    key_embeddings: Float[np.ndarray, "n d"],
    known: KnownPositives,
    others: Mapping[str, Scorer] = MappingProxyType({}),
    **options: Any,
) -> dict[str, RetrievalResult]:
    """Call `evaluate_retrieval` with key i for query i; each process ranks some of the queries."""
    count, processes = len(query_embeddings), jax.process_count()
    if processes == 1 or count < processes:
        return evaluate_retrieval(
            query_texts,
            key_texts,
            query_embeddings,
            key_embeddings,
            known=known,
            others=others,
            **options,
        )
    numbers = np.array_split(np.arange(count), processes)[jax.process_index()]
    rows = slice(numbers[0], numbers[-1] + 1)
    rank = functools.partial(
        evaluate_retrieval,
        None if query_texts is None else query_texts[rows],
        key_texts,
        query_embeddings[rows],
        key_embeddings,
        relevant=numbers,
        known=known.part(rows),
        others={name: functools.partial(_from, rows.start, one) for name, one in others.items()},
        **options,
    )
    results = together(rank)
    ranks = {method: np.zeros(count, np.float32) for method in results}  # halves are exact to 2^23
    for method, result in results.items():
        ranks[method][rows] = result.ranks
    return {
        method: RetrievalResult(parts.sum(0).astype(np.float64), len(key_embeddings), known.total())
        for method, parts in multihost_utils.process_allgather(ranks).items()
    }


def _from(first: int, scorer: Scorer, rows: slice) -> Float[np.ndarray, "t n"]:
    """The scores of a range of queries, counted from the first query of this process."""
    return scorer(slice(first + rows.start, first + rows.stop))


def held_out_summary(sources: Mapping[str, PairSource], results: Results) -> dict[str, Any]:
    """The means and standard errors of all results, with a description of the data."""
    return {
        "rows": {split: len(source) for split, source in sources.items()},
        "fingerprints": {split: source.fingerprint for split, source in sources.items()},
        "left_out": {split: _num_left_out(by_method) for (split, _), by_method in results.items()},
        **describe_environment(),
        "metrics": {
            split: {
                variant: _figures(results[split, variant])
                for name, variant in results
                if name == split
            }
            for split, _ in results
        },
    }


def _num_left_out(by_method: Mapping[str, RetrievalResult]) -> int:
    """The number of keys excluded because they also answer the query, summed over the queries."""
    return max((result.num_left_out for result in by_method.values()), default=0)


def _figures(by_method: Mapping[str, RetrievalResult]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        method: {
            name: {"mean": mean, "standard_error": error}
            for name, (mean, error) in result.summary().items()
        }
        for method, result in by_method.items()
    }
    for method in by_method:
        if method != "bm25" and "bm25" in by_method:
            mean, error = comparison(by_method, method, "bm25")
            figures[f"{method} - bm25"] = {"mrr@10": {"mean": mean, "standard_error": error}}
    return figures
