"""Trains several settings of a config with several seeds, and compares them query by query.

    python -m jaxcl.compare --config configs/code_search.py --settings configs/sweep_negatives.py \\
        --workdir runs/negatives --seeds 3

The settings are a Python file whose `get_settings()` returns overrides of the config by name,
such as `{"queue": {"negatives.bank.kind": "queue"}}`. Each run has its own folder and keeps
its metrics and the rank of every query, but no checkpoints; the same command resumes after a stop.

`comparison.json` and `comparison.md` hold the results: each setting's difference from the baseline,
paired by query and by seed, with its standard errors over queries and over seeds, and a 95%
interval over both (`jaxcl.metrics.paired_interval`). With one seed, the interval is over queries
only, and another seed may give another difference; use at least three.

In a program or a notebook, call `compare`:

    settings = {"plain": {}, "wide": {"model.dim": 1024}}
    compare(load_config("code_search"), settings, Path("runs/dim"), seeds=3)
"""

import hashlib
import json
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcl.data.prepare import read_remembered_data
from jaxcl.evaluation.retrieval import METRICS
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, user_path
from jaxcl.host.files import open_regular, read_json_object, write_whole
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import printable
from jaxcl.host.progress import say
from jaxcl.host.remote import remove_tree
from jaxcl.metrics import paired_interval
from jaxcl.run.identity import fields_of, pretrained_fingerprints
from jaxcl.settings.changed import changed_config
from jaxcl.settings.command_line import add_config_flags, config_of
from jaxcl.settings.config_files import read_settings_file
from jaxcl.settings.file_kinds import BUILT_IN
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from jaxcl.typing import Float

__all__ = ["compare", "main"]

METRIC = "mrr@10"
FINISHED = "finished.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.compare", __doc__)
    add_config_flags(parser)
    parser.add_argument(
        "--settings",
        metavar="FILE[:VARIANT]",
        required=True,
        help="a Python file with a function get_settings",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", type=user_path, required=True, help="the folder of all runs"
    )
    parser.add_argument("--seeds", type=int, default=3, help="the number of seeds (default: 3)")
    parser.add_argument(
        "--baseline", metavar="NAME", help="the setting to compare with; by default the first"
    )
    interrupted = "interrupted; the same command resumes from there"
    run_command(parser, _run, argv, interrupted=interrupted, trains=True)


def _run(arguments: Namespace) -> None:
    compare(
        config_of(arguments),
        read_settings_file(arguments.settings),
        arguments.workdir,
        seeds=arguments.seeds,
        baseline=arguments.baseline,
    )


def compare(
    config: ConfigDict,
    settings: Mapping[str, Mapping[str, Any]],
    workdir: AnyPath,
    *,
    seeds: int = 3,
    baseline: str | None = None,
) -> list[dict[str, Any]]:
    """Train every setting with every seed, seed by seed, and compare each with the baseline.

    Args:
      config: the config shared by all runs.
      settings: name -> overrides of the config, by dotted name.
      workdir: the parent folder of the runs.
      seeds: number of seeds; they start at 0.
      baseline: the name of the setting to compare with; the first by default.

    Returns:
      A record for each setting: for each held-out split and method (`results`), the mean over the
      seeds, the mean of each seed, the paired difference from the baseline, its standard errors
      over queries and over seeds, and its 95% interval; `interval_over` says whether the interval
      is over queries only. Values that need several seeds or queries are `None` without them.

    Raises:
      ValueError: for settings that do not fit the config.
    """
    workdir = as_path(workdir)
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings are {settings!r}; give a mapping, name -> changes")
    if not settings or seeds < 1:
        raise ValueError(f"{len(settings)} settings with {seeds} seeds; give at least one of each")
    baseline = next(iter(settings)) if baseline is None else baseline
    if baseline not in settings:
        raise ValueError(f"baseline={baseline!r} is none of {', '.join(settings)}")
    runs = {
        (name, seed): _changed(config, name, seed, changes)
        for seed in range(seeds)
        for name, changes in settings.items()
    }
    folders: dict[AnyPath, str] = {}
    for name in settings:
        other = folders.setdefault(_directory(workdir, name, 0), name)
        if other != name:
            raise ValueError(
                f"the settings {other!r} and {name!r} would share a folder; rename one"
            )
    for (name, seed), changed in runs.items():
        _check_finished(_directory(workdir, name, seed), changed)
    _check_same_queries([_directory(workdir, *run) for run in runs])
    for number, ((name, seed), changed) in enumerate(runs.items(), start=1):
        directory = _directory(workdir, name, seed)
        if not (directory / FINISHED).exists():
            say(f"run {number} of {len(runs)}: {name}, seed {seed}")
            start = time.perf_counter()
            alike = [run for run in runs if _data_set_of(runs[run]) == _data_set_of(changed)]
            own = _with_data_of([_directory(workdir, *run) for run in alike], changed)
            train(own, directory, changed=tuple(settings[name]))
            _check_same_queries([_directory(workdir, *run) for run in runs])
            finished = {"seconds": time.perf_counter() - start, "config": _identity(changed)}
            write_whole(directory / FINISHED, json.dumps(finished))
        remove_tree(directory / "checkpoints")
    records = [_record(workdir, name, baseline, seeds) for name in settings]
    write_whole(workdir / "comparison.json", json.dumps(records, indent=2) + "\n")
    table = as_markdown(records)
    write_whole(workdir / "comparison.md", table + "\n")
    print(table)
    return records


def _changed(config: ConfigDict, name: str, seed: int, changes: Mapping[str, Any]) -> ConfigDict:
    try:
        return changed_config(changed_config(config, changes), {"seed": seed})
    except ValueError as error:
        raise ValueError(f"of {name!r}: {error}") from error


def as_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for each held-out split and method, with a row for each setting that has results."""
    baseline = _cell(records[0]["baseline"])
    blocks = []
    for name, first in records[0]["results"].items():
        split, method = (_cell(part) for part in name.rsplit("/", 1))
        interval = f"95% interval over {first['interval_over']}"
        headings = ["setting", f"mean {METRIC.upper()}", "lowest to highest seed"]
        headings += [f"difference from {baseline}", "± over queries", "± over seeds", interval]
        headings += ["seconds per run"]
        lines = [_row(headings), "|---" * len(headings) + "|"]
        for record in records:
            if name not in record["results"]:  # a setting may rank with fewer methods
                continue
            seconds = f"{record['seconds']:.0f}"
            figures = _figures(record["results"][name], own=record["setting"] == record["baseline"])
            lines.append(_row([_cell(record["setting"]), *figures, seconds]))
        blocks += [f"{split}, {method}:", "\n".join(lines)]
    num_seeds = len(next(iter(records[0]["results"].values()))["seeds"])
    return printable("\n\n".join([*blocks, _remark(num_seeds, baseline)]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figures(result: Mapping[str, Any], *, own: bool) -> list[str]:
    """The cells of a setting's figures; the baseline has no difference from itself."""
    means = result["seeds"]
    cells = [f"{result['mean']:.3f}", f"{min(means):.3f} to {max(means):.3f}"]
    if own:
        return [*cells, "baseline", "", "", ""]
    errors = [result["error_over_queries"], result["error_over_seeds"]]
    reasons = ["1 query", f"{len(means)} seed"]
    cells.append(f"{result['difference']:+.4f}")
    for error, reason in zip(errors, reasons, strict=True):
        cells.append(f"not available ({reason})" if error is None else f"{error:.4f}")
    interval = result["interval"]
    return [*cells, "not available" if interval is None else "{:+.4f} to {:+.4f}".format(*interval)]


def _remark(num_seeds: int, baseline: str) -> str:
    remark = (
        f"Each query and seed is compared with the same query and seed of {baseline}. ± is the "
        "standard error of the difference. "
    )
    if num_seeds == 1:
        return remark + (
            "With 1 seed, the interval covers only the choice of held-out queries: another seed "
            "may give another difference. Use --seeds 3 or more to cover both."
        )
    return remark + (
        "The interval covers both the choice of held-out queries and that of the seeds, with "
        f"Student's t quantiles for {num_seeds} seeds."
    )


def _cell(name: str) -> str:
    return " ".join(name.split()).replace("|", r"\|")


def _identity(config: ConfigDict) -> str:
    """A digest that identifies a run's results: of the settings of its training and evaluation."""
    settings = read_settings(config)
    ranking = {f"evaluation.{name}": one for name, one in settings.evaluation._asdict().items()}
    fields = fields_of(settings) | pretrained_fingerprints(settings) | ranking
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _data_set_of(config: ConfigDict) -> tuple[str | None, Any]:
    data = read_settings(config).data
    return data.name, data.code_pairs


def _with_data_of(directories: Sequence[AnyPath], config: ConfigDict) -> ConfigDict:
    """The config with the data set that the first of these runs used, if it still exists."""
    records = (read_remembered_data(directory) for directory in directories)
    data_sets = [record.data_set for record in records if record is not None]
    if config.data.name not in BUILT_IN or not data_sets:
        return config
    data_set = data_sets[0]
    return changed_config(config, {"data.name": data_set}) if Path(data_set).exists() else config


def _check_same_queries(directories: Sequence[AnyPath]) -> None:
    """Raise a `ValueError` if the runs have different held-out rows."""
    first: dict[str, tuple[AnyPath, str]] = {}
    for directory in directories:
        remembered = read_remembered_data(directory)
        fingerprints = {} if remembered is None else remembered.fingerprints
        others = {"train", "negatives", "guides", "topics"}
        for role in [one for one in fingerprints if one not in others and "." not in one]:
            where, fingerprint = first.setdefault(role, (directory, fingerprints[role]))
            if fingerprint != fingerprints[role]:
                raise ValueError(
                    f"the {role} rows of {directory} differ from those of {where}, so the runs "
                    "cannot be compared; remove one of the two, or choose another --workdir"
                )


def _check_finished(directory: AnyPath, config: ConfigDict) -> None:
    finished = directory / FINISHED
    if finished.exists() and read_json_object(finished).get("config") != _identity(config):
        raise ValueError(f"{directory} holds a run of another config; choose another --workdir")


def _directory(workdir: AnyPath, name: str, seed: int) -> AnyPath:
    return workdir / "".join(c if c.isalnum() else "-" for c in name) / f"seed-{seed}"


def _record(workdir: AnyPath, name: str, baseline: str, seeds: int) -> dict[str, Any]:
    runs, baseline_runs = (
        [_values(_directory(workdir, setting, seed)) for seed in range(seeds)]
        for setting in (name, baseline)
    )
    results = {
        key: _result(
            *(np.stack([one[key] for one in several]) for several in (runs, baseline_runs))
        )
        for key in runs[0]
        if key in baseline_runs[0]  # a setting may rank with more methods
    }
    seconds = [
        read_json_object(_directory(workdir, name, seed) / FINISHED)["seconds"]
        for seed in range(seeds)
    ]
    return {
        "setting": name,
        "baseline": baseline,
        "results": results,
        "seconds": statistics.median(seconds),
    }


def _result(
    values: Float[np.ndarray, "seeds q"], baseline: Float[np.ndarray, "seeds q"]
) -> dict[str, Any]:
    """The figures of a setting for one split and method."""
    means = [float(of_seed.mean()) for of_seed in values]
    interval = paired_interval(values, baseline)
    return {
        "mean": statistics.mean(means),
        "seeds": means,
        "difference": interval.difference,
        "error_over_queries": _known(interval.error_over_queries),
        "error_over_seeds": _known(interval.error_over_seeds),
        "interval": None if math.isnan(interval.low) else [interval.low, interval.high],
        "interval_over": "queries and seeds" if len(means) > 1 else "queries only",
    }


def _known(error: float) -> float | None:
    """The error; for a single query or seed, `None` instead of NaN, which JSON does not have."""
    return None if math.isnan(error) else error


def _values(directory: AnyPath) -> dict[str, np.ndarray]:
    """Every query's value of the metric by `SPLIT/METHOD`, with function names visible in the keys.

    Between images and texts, the direction comes between split and method.
    """
    with open_regular(directory / "ranks.npz") as file, np.load(file) as ranks:
        return {
            "/".join((split, method) if variant == "plain" else (split, variant, method)): (
                METRICS[METRIC](ranks[name])
            )
            for name in ranks.files
            for split, variant, method in [name.split("/")]
            if variant != "name masked" and method not in ("bm25", "pixels")
        }


if __name__ == "__main__":
    main()
