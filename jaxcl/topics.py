"""Sorts the rows of a trained run into topics, for batches of one topic, or of all, in the next.

    python -m jaxcl.topics --workdir runs/code_search --topics 64

The training rows are embedded, and cut into topics of equal size whose rows are each other's hard
negatives (`jaxcl.assignment.assign_topics`). The result is a file for
`python -m jaxcl.train --config.data.topics=FILE --config.assignment.name=sourced
--config.assignment.sourced.by=topic --config.assignment.sourced.mix=one` (or `mixed`, for batches
over which all topics are spread). Next to it, `.examples.md` lists each topic's most central
queries. It runs in one process, on all of its devices.

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
    parser.add_argument("--topics", type=int, default=64, help="the number of topics (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=user_path,
        help=f"the file; DIR/topics-{_SPLIT}.npz by default",
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
        f"train by them with --config.data.topics={out} --config.assignment.name=sourced "
        "--config.assignment.sourced.by=topic --config.assignment.sourced.mix=one"
    )


def topics(
    workdir: AnyPath, out: AnyPath, *, num_topics: int, seed: int = 0, trust: Trust = ()
) -> dict[str, Any]:
    """Sorts the training rows of a run into topics, writes the file, and returns a report.

    Args:
      workdir: of a run that has saved a checkpoint; nothing of it is changed.
      out: the file to write, `.npz`: `topic`, of each row, and `source`, which names the rows.
      num_topics: how many, at most.
      seed: of what is drawn.
      trust: packages whose code the run may name.

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
            f"--topics={num_topics}, but the run has {len(source):,} training rows; give from 1 "
            "to as many"
        )
    sides = run.embeddings(_SPLIT, source)
    topic = assign_topics(
        *(sides[side] for side in SIDES), num_topics=num_topics, seed=seed, report=say
    )
    points = sides["query"] + sides["key"]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = np.stack([points[topic == one].mean(0) for one in range(topic.max() + 1)])
    sizes = np.bincount(topic)
    write_npz(out, topic=topic, source=np.array(source.fingerprint))
    write_whole(out.with_suffix(".examples.md"), _examples(source, topic, points, centres))
    return {
        "rows": len(topic),
        "topics": len(sizes),
        "rows of a topic": int(sizes[0]),
        "rows of the last": int(sizes[-1]),
        "mean cosine of two rows of a topic": _mean_cosine(centres, sizes),
        "mean cosine of any two rows": _mean_cosine(points.mean(0)[None], np.array([len(topic)])),
    }


def _mean_cosine(centres: Float[np.ndarray, "s d"], sizes: Int[np.ndarray, " s"]) -> float | None:
    """Of two different rows of one set, by the sets' means; `None` where all have one row."""
    sizes = sizes.astype(np.float64)
    pairs = (sizes * (sizes - 1)).sum()
    # The square of a sum of unit vectors has every row with itself, too.
    return float(((centres**2).sum(1) * sizes**2 - sizes).sum() / pairs) if pairs else None


def _examples(
    source: PairSource,
    topic: Int[np.ndarray, " n"],
    points: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "s d"],
) -> str:
    """Each topic's rows that are nearest to its mean."""
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
