"""The table that a training run and `jaxcl.evaluate` print for held-out rows."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxcl.evaluation.retrieval import RetrievalResult, comparison

__all__ = ["results_table"]


def results_table(
    results: Mapping[tuple[str, str], Mapping[str, RetrievalResult]],
    *,
    metrics: Sequence[str] = ("mrr@10", "recall@1", "recall@10"),
    baseline: str = "bm25",
) -> Table:
    """Format results as a `rich` table with a row for each split, variant and method.

    Args:
      results: `(split, variant)`, such as `("unseen packages", "name masked")` -> the result of
        `evaluate_retrieval`.
      metrics: the metrics to show as mean ± standard error; the default fits in 80 characters.
      baseline: the method to compare with. If a result has it, the last column shows the paired
        difference of MRR@10, and the difference divided by its standard error.
    """
    compares = any(baseline in by_method for by_method in results.values())
    table = Table("split", "variant", "method", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("keys", *metrics, *[f"vs {baseline} (SEs)"] * compares):
        table.add_column(heading, justify="right", no_wrap=True)
    for (split, variant), by_method in results.items():
        for method, result in by_method.items():
            summary = result.summary()
            cells = ["{:.3f}±{:.3f}".format(*summary[name]).replace("0.", ".") for name in metrics]
            if compares:
                cells.append(_versus(by_method, method, baseline))
            table.add_row(split, variant, method, f"{result.num_keys:,}", *cells)
        table.add_section()
    return table


def _versus(results: Mapping[str, RetrievalResult], method: str, baseline: str) -> str:
    if method == baseline or baseline not in results:
        return ""
    mean, error = comparison(results, method, baseline)
    return f"{mean:+.3f}" + (f" ({mean / error:+.1f})" if error > 0 else "")
