"""Mines hard negatives with a model, for a later run to train on.

    python -m jaxcl.mine --model models/minilm --queries pairs.jsonl --corpus corpus.jsonl \\
        --output mined.jsonl --relative-margin 0.05
    python -m jaxcl.mine --workdir runs/code_search --per-query 7 --rank-range 10:100

The search is exact: each query is compared with all keys, on all devices.

With `--model`, which takes any model that `jaxcl.load` accepts, the queries and their positives
come from a file. The keys are the documents of `--corpus`, or else the positives of all queries. A
query's record has its text (`query`, `anchor` or `question`) and its positives, as a text or a list
of texts (`positive`, `pos`, `key`, `answer`, …) or as ids of documents (`positive_ids`). With
`--qrels`, the positives come from relevance judgements in BEIR's format instead. The output has a
line of texts and similarities for each query, for
`python -m jaxcl.train --config.data.name=mined.jsonl`. Margins and limits apply to the similarities
of the model. With `--guide`, they apply to the similarities of another model, and with `--scores`
to a re-ranker's scores: JSON lines with `query`, `document` and `score`, or an earlier output whose
`teacher_scores` the re-ranker has replaced.

With `--workdir`, queries and keys are the rows of a split of the run. The output is a file of row
numbers and similarities, for `python -m jaxcl.train --config.data.negatives=FILE`.

A later run can also learn from the similarities (`loss.name=distillation`). The command writes a
report (`.report.json`) and examples to read (`.examples.md`) next to the output. If it is stopped,
the same command resumes. It runs in several processes with the same flags as `jaxcl.train`.

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
        help="instead of --workdir: any model that jaxcl.load accepts, to mine in files",
    )
    parser.add_argument(
        "--output",
        "--out",
        metavar="FILE",
        type=user_path,
        help="the file to write: .jsonl with --model, .npz with --workdir (default: "
        "DIR/mined-SPLIT.npz)",
    )
    _add_file_flags(parser)
    parser.add_argument("--split", help="with --workdir: the split to mine (default: train)")
    parser.add_argument(
        "--masks",
        nargs="+",
        help="with --workdir: columns in which a negative must differ from its query, of "
        f"{', '.join(MASKS)} (default: text)",
    )
    _add_rule_flags(parser)
    add_process_flags(parser)
    run_command(parser, _run, argv, interrupted="interrupted; the same command resumes from there")


def _add_file_flags(parser: CommandParser) -> None:
    files = {
        "--queries": "with --model: queries with their positives (.jsonl, .csv, .tsv, .parquet)",
        "--corpus": "with --model: the documents (default: the positives of all queries)",
        "--qrels": "with --model: relevance judgements, by ids of queries and documents",
        "--scores": "with --model: a re-ranker's scores, to which margins and limits apply",
    }
    for flag, text in files.items():
        parser.add_argument(flag, metavar="FILE", type=user_path, help=text)
    parser.add_argument(
        "--guide",
        metavar="PATH",
        type=user_path,
        help="with --model: a guide model, to whose similarities margins and limits apply",
    )
    parser.add_argument(
        "--skip-empty",
        action="store_true",
        default=None,
        help="with --model: leave out queries without negatives",
    )
    fields = {
        "--query-field": "the queries",
        "--positive-field": "the positives",
        "--id-field": "the documents' ids",
        "--text-field": "the documents' texts",
    }
    for flag, text in fields.items():
        help_text = f"with --model: field of {text}, if it has no common name"
        parser.add_argument(flag, metavar="NAME", help=help_text)


def _add_rule_flags(parser: CommandParser) -> None:
    rule = MiningRule()
    first, last = rule.rank_range
    parser.add_argument(
        "--per-query",
        type=int,
        default=rule.per_query,
        help=f"largest number of negatives per query (default: {rule.per_query})",
    )
    parser.add_argument(
        "--rank-range",
        metavar="FIRST:LAST",
        default=f"{first}:{last}",
        help=f"ranks of the candidates, counted from 0; LAST is excluded (default: {first}:{last})",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="a negative's similarity must be lower than the positive's by at least this amount; "
        "of several positives, the least similar is compared",
    )
    parser.add_argument(
        "--relative-margin",
        type=float,
        help="the margin as a share of the positive's similarity",
    )
    parser.add_argument("--min-score", type=float, help="lowest similarity of a negative")
    parser.add_argument("--max-score", type=float, help="highest similarity of a negative")
    parser.add_argument(
        "--sampling",
        default=rule.sampling,
        help="which candidates become negatives: random ones, or the top of the ranking "
        f"(random or top; default: {rule.sampling})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")


def _run(arguments: Namespace) -> None:
    # Results are written block by block, so that SIGTERM may end a process at once.
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
            say(f"to train on the negatives, use --config.data.negatives={out}")


def _mine_files(arguments: Namespace, rule: MiningRule) -> None:
    if arguments.queries is None or arguments.output is None:
        raise ValueError("--model needs --queries with a file, and --output with the file to write")
    join_processes(arguments, arguments.output.parent)
    keep_compiled()
    files = MinedFiles(**{name: getattr(arguments, name) for name in MinedFiles._fields})
    report = mine_corpus(
        arguments.model,
        files,
        rule=rule,
        guide=arguments.guide,
        skip_empty=bool(arguments.skip_empty),
        seed=arguments.seed,
        trust=arguments.trust,
    )
    if jax.process_index() == 0:
        rich.print(report_table(report))
        say(f"embeddings are kept in {cache_folder() / 'mining'}, to mine by other rules")
        say(f"to train on the negatives, use --config.data.name={arguments.output}")


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
    """Mine hard negatives for the rows of a split among the same rows, and write them to a file.

    Args:
      workdir: the folder of a run that has saved a checkpoint, or the path of a checkpoint in it.
        The run stays unchanged except for its folder `mining`, which keeps unfinished work and the
        embeddings, for use with other rules.
      out: the file to write, `.npz`.
      split: name of the split.
      rule: the rule that selects negatives among the nearest keys.
      masks: columns in which a negative must differ from its query: `"row"`, `"text"`, `"group"`.
      seed: seed of the random draws.
      trust: packages from which parts named `package.module:function` may be imported.

    Returns:
      The report.

    Raises:
      ValueError: if there is no such run or split, or the rule leaves no negatives.
      CheckpointError: if no checkpoint can be read.
    """
    workdir, out = as_path(workdir), as_path(out)
    rule.check()
    if is_remote(workdir) and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes need a workdir in which to share unfinished work, "
            f"but {workdir} is remote; mount it, or mine with one process"
        )
    unknown = set(masks) - set(MASKS)
    if unknown or not {"row", "text"} & set(masks):
        raise ValueError(
            f"masks={tuple(masks)}: use some of {', '.join(MASKS)}, including 'row' or 'text'"
        )
    run = open_run(workdir, trust=trust)
    run.check_texts("jaxcl.mine")
    if "group" in masks and run.settings.data.group_field is None:
        raise ValueError("masks has 'group', but the run's data.group_field is None; leave it out")
    sources = run.sources()
    if split not in sources:
        raise ValueError(f"split={split!r} is unknown; the run has {', '.join(sources)}")
    source = sources[split]
    table = first_then_others(functools.partial(run.table, split, source))
    if table.num_rows <= rule.rank_range[0]:
        raise ValueError(f"the split has {table.num_rows} rows, none of rank {rule.rank_range[0]}")
    options = {"rule": rule_record(rule), "masks": sorted(masks), "seed": seed}
    mined = _mine_table(run, table, split, options, rule)
    report = {"split": split, **options, **mined_figures(mined), "made_from": run.made_from}
    if jax.process_index() == 0:
        _write(out, source, mined)
        write_reports(out, report, _examples(source, mined, seed))
    return report


def _mine_table(
    run: OpenedRun, table: Table, split: str, options: dict[str, Any], rule: MiningRule
) -> HardNegatives:
    """Embed the rows of a table and mine their negatives, resuming unfinished work."""
    folder = local_folder(run.workdir) / "mining" / json_digest({"split": split, **run.made_from})
    vectors = {side: _embedded(run, table, side, folder) for side in SIDES}
    labels = table.labels(np.arange(table.num_rows))
    groups = tuple(np.asarray(labels[mask]) for mask in options["masks"])
    mine = make_miner(
        vectors["key"],
        rule=rule,
        groups=groups,
        seed=options["seed"],
        block_rows=min(BLOCK_ROWS, table.num_rows),
        mesh=run.encoder.mesh,
    )

    def block_of(rows: np.ndarray) -> QueryBlock:
        own = tuple(label[rows] for label in groups)
        return QueryBlock(rows, vectors["query"][rows], positives=rows, groups=own)

    folder = folder / json_digest(options)
    return mine_in_blocks(mine, block_of, table.num_rows, rule.per_query, folder)


def _embedded(run: OpenedRun, table: Table, side: str, folder: Path) -> Float[np.ndarray, "n d"]:
    def embed(rows: np.ndarray, advance: Callable[[int], None]) -> Float[np.ndarray, "n d"]:
        return run.encoder.embed(side, table, rows, advance=advance)

    title = {"query": "embedding queries", "key": "embedding keys"}[side]
    path, dim = folder / f"{side}.npy", run.settings.model.dim
    return embed_in_blocks(path, table.num_rows, dim, embed, title=title)


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
        texts = [negative["key"] for negative in source.read(mined.rows[row][present])]
        columns = (mined.ranks[row][present], mined.scores[row][present], texts)
        yield Example(
            record["query"],
            [record["key"]],
            float(mined.positive_scores[row]),
            [(int(rank), float(score), text) for rank, score, text in zip(*columns, strict=True)],
        )


def _rank_range(text: str) -> tuple[int, int]:
    first, separator, last = text.partition(":")
    if not separator or not first.isdigit() or not last.isdigit():
        raise ValueError(f"--rank-range={text} is not a range; give two ranks, such as 10:100")
    return int(first), int(last)


if __name__ == "__main__":
    main()
