"""Mines hard negatives with a model, for the next run to train on.

    python -m jaxcl.mine --model models/minilm --queries pairs.jsonl --corpus corpus.jsonl \\
        --output mined.jsonl --relative-margin 0.05
    python -m jaxcl.mine --workdir runs/code_search --per-query 7 --rank-range 10:100

Each query is compared with all keys, exactly, over all devices.

With `--model`, any model that `jaxcl.load` accepts, the queries and their positives come from a
file, and the keys are the documents of a corpus, or else the positives of all queries. A record of
the queries has a text (`query`, `anchor` or `question`) and positives (`positive`, `pos`, `key`,
`answer`, …: a text or a list), or the ids of positive documents (`positive_ids`); with `--qrels`,
positives are BEIR's judgements. The output is a line of texts and similarities for each query, for
`python -m jaxcl.train --config.data.name=mined.jsonl`. With `--guide`, another model decides about
margins and limits; with `--scores`, a re-ranker: JSON lines of `query`, `document` and `score`, or
an earlier output with its `teacher_scores` replaced.

With `--workdir`, queries and keys are the rows of a run's split. The output is a file of row
numbers and similarities, for `python -m jaxcl.train --config.data.negatives=FILE`.

The similarities may teach the next run (`loss.name=distillation`). Next to the output are a report
(`.report.json`) and examples to read (`.examples.md`). The same command resumes after a stop.
Several processes find each other as those of `jaxcl.train` do.

In a program or a notebook, call `mine` for a run, and `jaxcl.run.corpus_mining.mine_corpus` for
files; `jaxcl.negatives.mine_hard_negatives` takes embeddings:

    mine(Path("runs/code_search"), Path("mined.npz"), rule=MiningRule(per_query=7))
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich

from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table
from jaxcl.host.command import join_processes, run_command
from jaxcl.host.command_flags import CommandParser, add_process_flags, add_workdir_flag, user_path
from jaxcl.host.files import is_remote, write_npz
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.processes import first_then_others
from jaxcl.host.progress import say
from jaxcl.host.remote import local_folder
from jaxcl.host.user_folders import cache_folder
from jaxcl.negatives.hard_negatives import HardNegatives, QueryBlock, make_miner
from jaxcl.negatives.mining import MiningRule
from jaxcl.run.corpus_mining import MinedFiles, mine_corpus
from jaxcl.run.mined_blocks import BLOCK_ROWS, embed_in_blocks, mine_in_blocks
from jaxcl.run.mining_report import (
    Example,
    example_rows,
    json_digest,
    mined_figures,
    report_table,
    rule_record,
    write_reports,
)
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.watch import keep_compiled
from jaxcl.settings.derived import origin_of
from jaxcl.settings.parts import Trust
from jaxcl.typing import SIDES, Float

__all__ = ["main", "mine"]

MASKS = ("row", "text", "group")
_OF_RUN = ("split", "masks")
_OF_FILES = (
    *("queries", "corpus", "qrels", "scores", "guide", "skip_empty"),
    *("query_field", "positive_field", "id_field", "text_field"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.mine", __doc__)
    add_workdir_flag(parser, required=False)
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=user_path,
        help="instead of a run and its rows: any model that jaxcl.load accepts, and files",
    )
    parser.add_argument(
        "--output",
        "--out",
        metavar="FILE",
        type=user_path,
        help="the file to write: .jsonl with --model; else .npz (default: DIR/mined-SPLIT.npz)",
    )
    _add_file_flags(parser)
    parser.add_argument("--split", help="with --workdir: the split (default: train)")
    parser.add_argument(
        "--masks",
        nargs="+",
        help="with --workdir: columns in which a query and its negatives differ, of "
        f"{', '.join(MASKS)} (default: text)",
    )
    _add_rule_flags(parser)
    add_process_flags(parser)
    run_command(parser, _run, argv, interrupted="interrupted; the same command resumes from there")


def _add_file_flags(parser: CommandParser) -> None:
    files = {
        "--queries": "with --model: queries with their positives (.jsonl, .csv, .tsv, .parquet)",
        "--corpus": "with --model: the documents (default: the positives of all queries)",
        "--qrels": "with --model: relevance judgements of queries and documents by their ids",
        "--scores": "with --model: a re-ranker's scores, which decide about margins and limits",
    }
    for flag, text in files.items():
        parser.add_argument(flag, metavar="FILE", type=user_path, help=text)
    parser.add_argument(
        "--guide",
        metavar="PATH",
        type=user_path,
        help="with --model: another model, whose similarities decide about margins and limits",
    )
    parser.add_argument(
        "--skip-empty",
        action="store_true",
        default=None,
        help="with --model: leave out queries without negatives",
    )
    fields = {
        "--query-field": "of the queries, if their name is not a common one",
        "--positive-field": "of the positives, likewise",
        "--id-field": "of the ids of documents, likewise",
        "--text-field": "of the texts of documents, likewise",
    }
    for flag, text in fields.items():
        parser.add_argument(flag, metavar="NAME", help=f"with --model: field {text}")


def _add_rule_flags(parser: CommandParser) -> None:
    rule = MiningRule()
    first, last = rule.rank_range
    parser.add_argument(
        "--per-query",
        type=int,
        default=rule.per_query,
        help=f"the most negatives of a query (default: {rule.per_query})",
    )
    parser.add_argument(
        "--rank-range",
        metavar="FIRST:LAST",
        default=f"{first}:{last}",
        help=f"first rank, from 0, and first rank past the end (default: {first}:{last})",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="a negative is less similar than the positive, or the least similar of several "
        "positives, by at least this amount",
    )
    parser.add_argument(
        "--relative-margin", type=float, help="the same as a share of the positive's similarity"
    )
    parser.add_argument("--min-score", type=float, help="least similarity of a negative")
    parser.add_argument("--max-score", type=float, help="greatest similarity of a negative")
    parser.add_argument(
        "--sampling", default=rule.sampling, help=f"random or top (default: {rule.sampling})"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")


def _run(arguments: Namespace) -> None:
    # Results are written as they are found, so that SIGTERM may end a process at once.
    jax.config.update("jax_enable_preemption_service", False)
    if (arguments.workdir is None) == (arguments.model is None):
        raise ValueError("give either --workdir with a run, or --model with --queries")
    of_run = arguments.workdir is not None
    unused = [name for name in (_OF_FILES if of_run else _OF_RUN) if getattr(arguments, name)]
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        needed = "--model" if of_run else "--workdir"
        raise ValueError(f"{flags}: no effect without {needed}; leave out, or use {needed}")
    rule = MiningRule(
        per_query=arguments.per_query,
        rank_range=_rank_range(arguments.rank_range),
        margin=arguments.margin,
        relative_margin=arguments.relative_margin,
        sampling=arguments.sampling,
        min_score=arguments.min_score,
        max_score=arguments.max_score,
    )
    (_mine_run if of_run else _mine_files)(arguments, rule)


def _mine_run(arguments: Namespace, rule: MiningRule) -> None:
    workdir, _ = origin_of(arguments.workdir)
    join_processes(arguments, workdir)
    split = arguments.split or "train"
    out = arguments.output or workdir / f"mined-{split}.npz"
    report = mine(
        arguments.workdir,
        out,
        split=split,
        rule=rule,
        masks=arguments.masks or ("text",),
        seed=arguments.seed,
        trust=arguments.trust,
    )
    if jax.process_index() == 0:
        rich.print(report_table(report))
        if split == "train":
            say(f"train on them with --config.data.negatives={out}")


def _mine_files(arguments: Namespace, rule: MiningRule) -> None:
    if arguments.queries is None or arguments.output is None:
        raise ValueError("--model needs --queries with a file, and --output with the file to write")
    join_processes(arguments, arguments.output.parent)
    keep_compiled()
    given = {name: getattr(arguments, name) for name in MinedFiles._fields}
    report = mine_corpus(
        arguments.model,
        MinedFiles(**given),
        rule=rule,
        guide=arguments.guide,
        skip_empty=bool(arguments.skip_empty),
        seed=arguments.seed,
        trust=arguments.trust,
    )
    if jax.process_index() == 0:
        rich.print(report_table(report))
        say(f"embeddings are kept for other rules in {cache_folder() / 'mining'}")
        say(f"train on them with --config.data.name={arguments.output}")


def mine(
    workdir: AnyPath,
    out: AnyPath,
    *,
    split: str = "train",
    rule: MiningRule,
    masks: Sequence[str] = ("text",),
    seed: int = 0,
    trust: Trust = (),
) -> dict[str, Any]:
    """Mine the hard negatives of a split's rows among the same rows, and write them.

    Args:
      workdir: the folder of a run that has saved a checkpoint, or the path of a checkpoint in it.
        Only the run's folder `mining` changes, which keeps the embeddings for another rule, and
        unfinished work.
      out: the file to write, `.npz`.
      split: the split.
      rule: which of the nearest keys are negatives.
      masks: columns in which a query and its negatives differ: `"row"`, `"text"`, `"group"`.
      seed: seed of the random draws.
      trust: packages whose code the run may name.

    Returns:
      The report.

    Raises:
      ValueError: if there is no such run or split, or nothing is found by the rule.
      CheckpointError: if no checkpoint can be read.
    """
    workdir, out = as_path(workdir), as_path(out)
    rule.check()
    if is_remote(workdir) and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes share unfinished work in the workdir, which "
            f"{workdir} cannot hold; mount it, or mine with one process"
        )
    unknown = set(masks) - set(MASKS)
    if unknown or not {"row", "text"} & set(masks):
        raise ValueError(
            f"masks={tuple(masks)}: use some of {', '.join(MASKS)}, 'row' or 'text' among them"
        )
    run = open_run(workdir, trust=trust)
    run.check_texts("jaxcl.mine")
    if "group" in masks and run.settings.data.group_field is None:
        raise ValueError("masks name 'group', but the run's data.group_field is None; leave it out")
    sources = run.sources()
    if split not in sources:
        raise ValueError(f"split={split!r} is unknown; the run has {', '.join(sources)}")
    source = sources[split]
    table = first_then_others(functools.partial(run.table, split, source))
    if table.num_rows <= rule.rank_range[0]:
        raise ValueError(f"the split has {table.num_rows} rows, none of rank {rule.rank_range[0]}")
    what = {"rule": rule_record(rule), "masks": sorted(masks), "seed": seed}
    mined = _mine_table(run, table, split, what, rule)
    report = {"split": split, **what, **mined_figures(mined), "made_from": run.made_from}
    if jax.process_index() == 0:
        _write(out, source, mined)
        write_reports(out, report, _examples(source, mined, seed))
    return report


def _mine_table(
    run: OpenedRun, table: Table, split: str, what: dict[str, Any], rule: MiningRule
) -> HardNegatives:
    """Embed the rows of a table, and mine their negatives, continuing earlier work."""
    folder = local_folder(run.workdir) / "mining" / json_digest({"split": split, **run.made_from})
    vectors = {side: _embedded(run, table, side, folder) for side in SIDES}
    labels = table.labels(np.arange(table.num_rows))
    groups = tuple(np.asarray(labels[mask]) for mask in what["masks"])
    mine = make_miner(
        vectors["key"],
        rule=rule,
        groups=groups,
        seed=what["seed"],
        block_rows=min(BLOCK_ROWS, table.num_rows),
        mesh=run.encoder.mesh,
    )

    def block_of(rows: np.ndarray) -> QueryBlock:
        own = tuple(label[rows] for label in groups)
        return QueryBlock(rows, vectors["query"][rows], positives=rows, groups=own)

    folder = folder / json_digest(what)
    return mine_in_blocks(mine, block_of, table.num_rows, rule.per_query, folder)


def _embedded(run: OpenedRun, table: Table, side: str, folder: Path) -> Float[np.ndarray, "n d"]:
    def embed(rows: np.ndarray, advance: Callable[[int], None]) -> Float[np.ndarray, "n d"]:
        return run.encoder.embed(side, table, rows, advance=advance)

    what = {"query": "embedding queries", "key": "embedding keys"}[side]
    path, dim = folder / f"{side}.npy", run.settings.model.dim
    return embed_in_blocks(path, table.num_rows, dim, embed, what=what)


def _write(out: AnyPath, source: PairSource, mined: HardNegatives) -> None:
    scores = np.where(mined.rows >= 0, mined.scores, 0)
    write_npz(
        out,
        rows=np.asarray(mined.rows),
        teacher_scores=np.concatenate([mined.positive_scores[:, None], scores], axis=1),
        ranks=np.asarray(mined.ranks),
        source=np.array(source.fingerprint),
    )


def _examples(source: PairSource, mined: HardNegatives, seed: int) -> Iterator[Example]:
    for row in example_rows(len(mined.rows), seed):
        (record,) = source.read([row])
        present = mined.rows[row] >= 0
        texts = [one["key"] for one in source.read(mined.rows[row][present])]
        found = (mined.ranks[row][present], mined.scores[row][present], texts)
        yield Example(
            record["query"],
            [record["key"]],
            float(mined.positive_scores[row]),
            [(int(rank), float(score), text) for rank, score, text in zip(*found, strict=True)],
        )


def _rank_range(text: str) -> tuple[int, int]:
    first, separator, last = text.partition(":")
    if not separator or not first.isdigit() or not last.isdigit():
        raise ValueError(f"--rank-range={text} is no range; give two ranks, such as 10:100")
    return int(first), int(last)


if __name__ == "__main__":
    main()
