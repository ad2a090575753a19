"""Mines hard negatives with a trained run, for the next one to train on.

    python -m jaxcl.mine --workdir runs/code_search --per-query 7 --rank-range 10:100

Every query is compared with all keys of its split, exactly, over all devices. The result is a file
for `python -m jaxcl.train --config.data.negatives=FILE`: the rows of each row's negatives, and this
run's similarities, which may teach the next run (`loss.name=distillation`). Next to it are a report
(`.report.json`) and examples to read (`.examples.md`). The same command resumes after a stop.
Several processes find each other as those of `jaxcl.train` do.

In a program or a notebook, call `mine`:

    mine(Path("runs/code_search"), Path("mined.npz"), rule=MiningRule(per_query=7))
"""

import functools
import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from jax.sharding import Mesh, PartitionSpec

from jaxcl.data.sources import PairSource
from jaxcl.data.table import Table
from jaxcl.host.block_file import BlockFile
from jaxcl.host.command import join_processes, run_command
from jaxcl.host.command_flags import CommandParser, add_process_flags, add_workdir_flag, user_path
from jaxcl.host.files import is_remote, write_npz, write_whole
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import printable
from jaxcl.host.processes import first_then_others
from jaxcl.host.progress import progress_bar, say
from jaxcl.host.remote import local_folder
from jaxcl.negatives.mining import Mined, MiningRule, mine_negatives
from jaxcl.ops.mesh import fetch, local_rows, put_batch
from jaxcl.ops.pairs import PairLabels
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.settings.derived import origin_of
from jaxcl.settings.parts import Trust
from jaxcl.typing import SIDES, PyTree

__all__ = ["main", "mine"]

MASKS = ("row", "text", "group")
_BLOCK_ROWS = 4_096
_EXAMPLES = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.mine", __doc__)
    rule = MiningRule()
    first, last = rule.rank_range
    add_workdir_flag(parser)
    parser.add_argument("--split", default="train", help="whose rows (default: train)")
    parser.add_argument(
        "--per-query", type=int, default=rule.per_query, help="negatives of a row, at most"
    )
    parser.add_argument(
        "--rank-range",
        metavar="FIRST:LAST",
        default=f"{first}:{last}",
        help="first rank, and the first beyond",
    )
    parser.add_argument("--margin", type=float, help="how much less similar than the own key")
    parser.add_argument("--relative-margin", type=float, help="the same as a share of it")
    parser.add_argument("--sampling", default=rule.sampling, help="random, or top")
    parser.add_argument("--masks", nargs="+", default=["text"], help=f"some of {', '.join(MASKS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    parser.add_argument(
        "--out", metavar="FILE", type=user_path, help="the file; DIR/mined-SPLIT.npz by default"
    )
    add_process_flags(parser)
    run_command(parser, _run, argv, interrupted="interrupted; the same command resumes from there")


def _run(arguments: Namespace) -> None:
    # Results are written as they are found, so that SIGTERM may end a process at once.
    jax.config.update("jax_enable_preemption_service", False)
    join_processes(arguments, arguments.workdir)
    rule = MiningRule(
        per_query=arguments.per_query,
        rank_range=_rank_range(arguments.rank_range),
        margin=arguments.margin,
        relative_margin=arguments.relative_margin,
        sampling=arguments.sampling,
    )
    split = arguments.split
    out = arguments.out or origin_of(arguments.workdir)[0] / f"mined-{split}.npz"
    report = mine(
        arguments.workdir,
        out,
        split=split,
        rule=rule,
        masks=arguments.masks,
        seed=arguments.seed,
        trust=arguments.trust,
    )
    if jax.process_index() == 0:
        rich.print(_as_table(report))
        if split == "train":
            say(f"train on them with --config.data.negatives={out}")


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
    """Mines the rows of a split, writes the file, and returns the report.

    Args:
      workdir: of a run that has saved a checkpoint; nothing of it is changed but the folder
        `mining`, which keeps the embeddings for the next rule, and unfinished work.
      out: the file to write, `.npz`.
      split: whose queries look among whose keys.
      rule: which are taken.
      masks: columns whose equals are no negatives: `"row"`, `"text"`, `"group"`.
      seed: of the random choice within the range of ranks.
      trust: packages whose code the run may name.

    Raises:
      ValueError: if there is no such run or split, or by the rule nothing could be found.
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
    folder = _work_folder(run.workdir, run, split)
    vectors = {side: _embedded(run, table, side, folder) for side in SIDES}
    known = table.labels(np.arange(table.num_rows))
    labels = tuple(known[mask] for mask in masks)
    what = {
        "rule": rule._asdict() | {"rank_range": list(rule.rank_range)},
        "masks": sorted(masks),
        "seed": seed,
    }
    found = _search_all(run.encoder.mesh, vectors, labels, rule, seed, folder / _hash(what))
    if not (np.asarray(found.rows) >= 0).any():
        raise ValueError("nothing was found by this rule; widen the ranks, or lower the margin")
    positives = np.einsum("nd,nd->n", vectors["query"], vectors["key"], dtype=np.float32)
    scores = np.where(found.rows >= 0, found.similarities, 0)
    report = {"split": split, **what, **_figures(found, positives), "made_from": run.made_from}
    if jax.process_index() != 0:
        return report
    write_npz(
        out,
        rows=np.asarray(found.rows),
        teacher_scores=np.concatenate([positives[:, None], scores], axis=1),
        ranks=np.asarray(found.ranks),
        source=np.array(source.fingerprint),
    )
    write_whole(out.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    write_whole(out.with_suffix(".examples.md"), _examples(source, found, positives, seed))
    return report


def _work_folder(workdir: AnyPath, run: OpenedRun, split: str) -> AnyPath:
    """Where unfinished work of these parameters on this split lies."""
    return local_folder(workdir) / "mining" / _hash({"split": split, **run.made_from})


def _embedded(run: OpenedRun, table: Table, side: str, folder: AnyPath) -> np.ndarray:
    """All rows of a side, embedded block by block."""
    shape = (table.num_rows, run.settings.model.dim)
    blocks = _block_file(folder / f"{side}.npy", shape, np.float32)
    name = {"query": "embedding queries", "key": "embedding keys"}[side]
    with progress_bar(name, table.num_rows) as advance:
        advance(blocks.done)
        while blocks.done < table.num_rows:
            rows = np.arange(blocks.done, min(blocks.done + _BLOCK_ROWS, table.num_rows))
            blocks.append(run.encoder.embed(side, table, rows, advance=advance))
    return blocks.array


def _search_all(
    mesh: Mesh,
    vectors: dict[str, np.ndarray],
    labels: tuple[np.ndarray, ...],
    rule: MiningRule,
    seed: int,
    folder: AnyPath,
) -> Mined:
    """The negatives of all rows, block by block of queries."""
    num_rows = len(vectors["query"])
    shape = (num_rows, rule.per_query)
    # The ranks are written last: how many are done of them is done of all.
    files = [
        _block_file(folder / f"{name}.npy", shape, dtype)
        for name, dtype in (("rows", np.int32), ("similarities", np.float32), ("ranks", np.int32))
    ]
    done = min(file.done for file in files)
    for file in files:
        file.keep(done)
    search = _search(mesh, rule, seed)
    keys = _padded(vectors["key"], num_rows + -num_rows % mesh.size)
    their_labels = tuple(_padded(label, len(keys)) for label in labels)
    pool = _put((keys, their_labels, np.arange(len(keys)) < num_rows), mesh)
    block = _BLOCK_ROWS + -_BLOCK_ROWS % mesh.size
    with progress_bar("mining", num_rows) as advance:
        advance(done)
        while done < num_rows:
            rows = np.arange(done, min(done + block, num_rows))
            looking = (
                *(_padded(vectors[side][rows], block) for side in SIDES),
                tuple(_padded(label[rows], block) for label in labels),
                _padded(rows.astype(np.int32), block),
            )
            found = search(_put(looking, mesh), pool)
            for file, values in zip(files, found, strict=True):
                file.append(fetch(jnp.asarray(values))[: len(rows)])
            done += len(rows)
            advance(len(rows))
    return Mined(*(file.array for file in files))


def _search(mesh: Mesh, rule: MiningRule, seed: int) -> Callable[[Any, Any], Mined]:
    rows, key = PartitionSpec(mesh.axis_names), jax.random.key(seed)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    def search(looking: Any, pool: Any) -> Mined:
        queries, positives, ids, numbers = looking
        keys, their_ids, valid = pool
        return mine_negatives(
            queries,
            positives,
            keys,
            rule=rule,
            row_keys=jax.vmap(jax.random.fold_in, (None, 0))(key, numbers),
            query_labels=PairLabels(different=ids),
            table_labels=PairLabels(different=their_ids, valid=valid),
            axis_name=mesh.axis_names,
        )

    return search


def _block_file(path: AnyPath, shape: tuple[int, ...], dtype: type) -> BlockFile:
    writes = jax.process_index() == 0
    return first_then_others(lambda: BlockFile(path, shape, dtype, writes=writes))


def _put(rows: PyTree, mesh: Mesh) -> PyTree:
    """Rows that every process has, on the devices of all."""
    return put_batch(jax.tree.map(local_rows, rows), mesh)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)))


def _figures(found: Mined, positives: np.ndarray) -> dict[str, Any]:
    there = found.rows >= 0
    counts = there.sum(1)
    some = max(int(there.sum()), 1)
    similarity = float(np.where(there, found.similarities, 0).sum() / some)
    gaps = np.where(there, positives[:, None] - np.where(there, found.similarities, 0), 0)
    return {
        "rows": len(counts),
        "negatives": int(there.sum()),
        "rows with all": int((counts == found.rows.shape[1]).sum()),
        "rows with none": int((counts == 0).sum()),
        "mean similarity of a row's own key": float(positives.mean()),
        "mean similarity of a negative": similarity,
        "mean margin to the own key": float(gaps.sum() / some),
        "negatives more similar than the own key": int((gaps < 0).sum()),
        "mean rank": float(np.where(there, found.ranks, 0).sum() / some),
    }


def _as_table(report: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table("mined", "", show_header=False)
    for name, value in report.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    return table


def _examples(source: PairSource, found: Mined, positives: np.ndarray, seed: int) -> str:
    """Some rows with their negatives, to judge by eye whether those are none of the positives."""
    chosen = np.random.default_rng(seed).permutation(len(positives))[:_EXAMPLES]
    lines = ["# Mined negatives, by example", ""]
    for row in chosen:
        (record,) = source.read([int(row)])
        lines += [f"## {_one_line(record['query'])}", "", f"- **its own** ({positives[row]:.3f})"]
        lines += [f"  `{_one_line(record['key'])}`"]
        for other, similarity, rank in zip(*(part[row] for part in found), strict=True):
            if other >= 0:
                (their,) = source.read([int(other)])
                lines.append(f"- rank {rank} ({similarity:.3f}) `{_one_line(their['key'])}`")
        lines.append("")
    return printable("\n".join(lines))


def _one_line(text: str, width: int = 160) -> str:
    line = " ".join(text.split()).replace("`", "'")
    return line if len(line) <= width else line[: width - 1] + "…"


def _hash(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def _rank_range(text: str) -> tuple[int, int]:
    first, separator, last = text.partition(":")
    if not separator or not first.isdigit() or not last.isdigit():
        raise ValueError(f"--rank-range={text} is no range; give two ranks, such as 10:100")
    return int(first), int(last)


if __name__ == "__main__":
    main()
