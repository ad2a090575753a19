"""Clusters the training rows of a run into topics, from which a later run draws its batches.

    python -m jaxcl.topics --workdir runs/code_search --topics 64

The command embeds the training rows and divides them into topics of equal size, such that the rows
of a topic are hard negatives for each other (`jaxcl.assignment.assign_topics`). It runs in one
process, on all of its devices. To train with one topic per batch, run

    python -m jaxcl.train --config configs/code_search.py --config.data.topics=FILE \\
        --config.assignment.name=sourced --config.assignment.sourced.by=topic \\
        --config.assignment.sourced.mix=single

With `mix=mixed`, each batch has rows of all topics. The file `.examples.md` next to the output
lists the most central queries of each topic.

In a program or a notebook, call `topics`:

    topics(Path("runs/code_search"), Path("topics.npz"), num_topics=64)
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich
from rich.table import Table

from jaxcl.assignment import assign_topics
from jaxcl.data.sources import PairSource
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_workdir_flag, user_path
from jaxcl.host.files import write_npz, write_whole
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import printable
from jaxcl.host.progress import say
from jaxcl.run.opened import open_run
from jaxcl.settings.derived import origin_of
from jaxcl.settings.parts import Trust
from jaxcl.typing import SIDES, Float, Int

__all__ = ["main", "topics"]

_SPLIT = "train"
_EXAMPLES = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.topics", __doc__)
    add_workdir_flag(parser)
    parser.add_argument("--topics", type=int, default=64, help="number of topics (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=user_path,
        help=f"the file to write (default: DIR/topics-{_SPLIT}.npz)",
    )
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    out = arguments.out or origin_of(arguments.workdir)[0] / f"topics-{_SPLIT}.npz"
    report = topics(
        arguments.workdir,
        out,
        num_topics=arguments.topics,
        seed=arguments.seed,
        trust=arguments.trust,
    )
    table = Table("topics", "", show_header=False)
    for name, value in report.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    rich.print(table)
    say(
        f"to train by topic, use --config.data.topics={out} --config.assignment.name=sourced "
        "--config.assignment.sourced.by=topic --config.assignment.sourced.mix=single"
    )


def topics(
    workdir: AnyPath, out: AnyPath, *, num_topics: int, seed: int = 0, trust: Trust = ()
) -> dict[str, Any]:
    """Cluster the training rows of a run into topics, and write them to a file.

    Args:
      workdir: the workdir of a run that has saved a checkpoint; it stays unchanged.
      out: the file to write, `.npz`, with the arrays `topic`, the topic number of each row, and
        `source`, a fingerprint of the rows.
      num_topics: the number of topics, at least 1 and at most the number of rows.
      seed: seed of the random draws.
      trust: packages from which parts named `package.module:function` may be imported.

    Returns:
      The report: sizes of the topics, and mean cosines within topics and over all rows.

    Raises:
      ValueError: if there is no such run, or it has fewer rows than topics.
      CheckpointError: if no checkpoint can be read.
    """
    workdir, out = as_path(workdir), as_path(out)
    run = open_run(workdir, trust=trust)
    run.check_texts("jaxcl.topics")
    source = run.sources()[_SPLIT]
    if not 1 <= num_topics <= len(source):
        raise ValueError(
            f"--topics={num_topics}, but the run has {len(source):,} training rows; give at least "
            "1, and at most the number of rows"
        )
    sides = run.embeddings(_SPLIT, source)
    topic = assign_topics(
        *(sides[side] for side in SIDES), num_topics=num_topics, seed=seed, report=say
    )
    points = sides["query"] + sides["key"]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = np.stack([points[topic == number].mean(0) for number in range(topic.max() + 1)])
    sizes = np.bincount(topic)
    write_npz(out, topic=topic, source=np.array(source.fingerprint))
    write_whole(out.with_suffix(".examples.md"), _examples(source, topic, points, centres))
    return {
        "rows": len(topic),
        "topics": len(sizes),
        "rows per topic": int(sizes[0]),
        "rows of the last topic": int(sizes[-1]),
        "mean cosine within topics": _mean_cosine(centres, sizes),
        "mean cosine of all rows": _mean_cosine(points.mean(0)[None], np.array([len(topic)])),
    }


def _mean_cosine(centres: Float[np.ndarray, "s d"], sizes: Int[np.ndarray, " s"]) -> float | None:
    """Compute the mean cosine of two different rows of a set from the means of the sets.

    Returns `None` if every set has only one row.
    """
    sizes = sizes.astype(np.float64)
    num_pairs = (sizes * (sizes - 1)).sum()
    # The squared sum of a set's unit vectors also contains the cosine of each row with itself.
    return float(((centres**2).sum(1) * sizes**2 - sizes).sum() / num_pairs) if num_pairs else None


def _examples(
    source: PairSource,
    topic: Int[np.ndarray, " n"],
    points: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "s d"],
) -> str:
    """Format a Markdown list of the queries that are nearest to the mean of their topic."""
    lines = ["# Topics, by their most central queries", ""]
    for number, centre in enumerate(centres):
        rows = np.flatnonzero(topic == number)
        central = rows[np.argsort(-points[rows] @ centre, kind="stable")[:_EXAMPLES]]
        lines += [f"## {number} ({len(rows):,} rows)", ""]
        lines += [f"- {' '.join(record['query'].split())}" for record in source.read(central)]
        lines.append("")
    return printable("\n".join(lines))


if __name__ == "__main__":
    main()
