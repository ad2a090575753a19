"""Evaluates any model: retrieval, similarity of texts, classes of images, or held-out pairs.

    python -m jaxcl.evaluate --model runs/code_search --data FOLDER
    python -m jaxcl.evaluate --model models/minilm --data stsb-dev.csv --output results.json
    python -m jaxcl.evaluate --model runs/mine --against models/minilm --data FOLDER

The data are one of

- a folder with the layout of BEIR (`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`): each query
  ranks all documents of the corpus, by BM25, by the model, and by both. Without `qrels/`, the
  queries name their `positives`;
- a file of pairs of texts with scores, or with labels 0 and 1;
- a folder of images by class, for classifiers on the frozen embeddings; the file `templates.txt` in
  that folder, for zero-shot classification; or a file of images with captions;
- `split:validation`, rows of a run or a config whose group is their class.

Without data, the command evaluates held-out pairs, as at the end of training: the rows of a config,
or of the run itself. Each query ranks all keys of its split, a small pool, in which every model
looks better than in a corpus.

    python -m jaxcl.evaluate --model runs/code_search
    python -m jaxcl.evaluate --model models/minilm --config configs/code_search.py

With `--against`, a second model is evaluated on the same data, and the command prints how much
better the first one is: the difference of each metric, paired by query or by pair of texts, with
its standard error and its 95% interval. An interval that does not contain 0 is a difference that
the choice of queries does not explain.

The model is anything that `jaxcl.load` accepts: the workdir of a run, an exported folder, or a
pretrained model as a baseline before training. It embeds texts with its own tokenizer, limits and
prompts.

In a program or a notebook, call `evaluate`:

    evaluate("runs/code_search", data="FOLDER", against="models/minilm")
"""

import json
import os
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict

from jaxcl.data.beir import is_beir, qrels_file
from jaxcl.data.prepare import RunData, open_sources
from jaxcl.data.sources import PairSource
from jaxcl.evaluation.check_held_out import check_evaluation
from jaxcl.evaluation.class_set import names_rows, open_rows
from jaxcl.evaluation.evaluate_held_out import Contender, evaluate_model
from jaxcl.evaluation.evaluate_set import check_methods, evaluate_set
from jaxcl.evaluation.protocol import EvaluationSet
from jaxcl.evaluation.retrieval import METHODS
from jaxcl.evaluation.sets import KINDS, open_set
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_model_flag, user_path
from jaxcl.host.files import write_whole
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.user_folders import shared_folder
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.load_model import is_run, load, model_of_run
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.watch import keep_compiled
from jaxcl.settings.command_line import add_config_flags, changed_fields, optional_config_of
from jaxcl.settings.derived import ranking_methods
from jaxcl.settings.parts import Trust
from jaxcl.settings.read import read_data_settings
from jaxcl.settings.sections import Settings

__all__ = ["evaluate", "main"]

_Model: TypeAlias = str | os.PathLike[str] | EmbeddingModel


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.evaluate", __doc__)
    add_model_flag(parser)
    parser.add_argument(
        "--against",
        metavar="PATH",
        type=user_path,
        help="a second model on the same data; prints the paired differences from it",
    )
    parser.add_argument(
        "--data", metavar="PATH", type=user_path, help="an evaluation set: a file or a folder"
    )
    parser.add_argument("--split", help="file of qrels/ to use (default: test, else dev)")
    parser.add_argument("--kind", choices=KINDS, help="of the data (default: by their content)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="how documents are ranked (default: all)"
    )
    add_config_flags(parser, required=False)
    parser.add_argument(
        "--output", metavar="FILE", type=user_path, help="write the results to a JSON file"
    )
    parser.add_argument("--batch-size", type=int, help="number of texts or images to embed at once")
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    keep_compiled()
    evaluate(
        arguments.model,
        against=arguments.against,
        data=arguments.data,
        split=arguments.split,
        kind=arguments.kind,
        methods=arguments.methods,
        config=optional_config_of(arguments),
        changed=changed_fields(arguments),
        output=arguments.output,
        batch_size=arguments.batch_size,
        trust=arguments.trust,
    )


def evaluate(
    model: _Model,
    *,
    against: _Model | None = None,
    data: str | os.PathLike[str] | None = None,
    split: str | None = None,
    kind: str | None = None,
    methods: Sequence[str] | None = None,
    config: ConfigDict | None = None,
    changed: Collection[str] = (),
    output: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    trust: Trust = (),
) -> dict[str, Any]:
    """Evaluate a model, alone or against another one, and print tables.

    Args:
      model: a model, or a path for `jaxcl.load`.
      against: a second model on the same data, from which the paired differences are computed.
      data: the path of an evaluation set, as for `jaxcl.evaluation.sets.open_set`; `None` for
        held-out pairs.
      split: name of the file in `qrels/` of a BEIR folder; `None` for `test`, else `dev`, else the
        only one.
      kind: a kind of `jaxcl.evaluation.sets.KINDS`; `None` detects it from the content.
      methods: the ranking methods for a BEIR folder, by default all of
        `jaxcl.evaluation.retrieval.METHODS`.
      config: names held-out rows (`data`) and the methods (`evaluation`); `None` uses the config of
        the run in `model`.
      changed: dotted names of the fields that the user changed; one without effect is an error.
      output: a JSON file for the results.
      batch_size: as for `EmbeddingModel.encode`.
      trust: packages whose code the run may name.

    Returns:
      The results, as in the file: metrics, with the sizes on which they depend, and a description
      of the model and the data. With a second model, also its description and metrics (`against`)
      and the `differences` from it, each with a `standard_error` and a 95% `interval`.

    Raises:
      ValueError: if there is no model, the data cannot be used, the data have no held-out split, or
        there are neither data nor a config and `model` is not the workdir of a run.
      OSError: if a file cannot be read or written.
      CheckpointError: if no checkpoint of a run can be read.
    """
    target = None if output is None else as_path(output)
    if isinstance(target, Path) and not target.parent.is_dir():  # fail before the work
        raise FileNotFoundError(f"the folder {target.parent} for the output does not exist")
    if data is None:
        _check_alone(split=split, kind=kind, methods=methods)
        results = _of_held_out_rows(model, against, config, changed, batch_size, trust)
    elif names_rows(data):
        for name, value in {"split": split, "methods": methods}.items():
            if value is not None:
                raise ValueError(f"--{name} has no effect with --data {data}; leave it out")
        rows = _rows(model, config, changed, trust)
        modality = rows.settings.data.modality._asdict()
        results = evaluate_set(
            _loaded(model, trust) if rows.run is None else model_of_run(rows.run),
            open_rows(str(data), rows.sources, modality=modality),
            against=None if against is None else _loaded(against, trust),
            batch_size=batch_size,
        )
        results = {"data": str(data), **results}
    else:
        if config is not None:
            raise ValueError("--data and --config both name what to evaluate on; give one of them")
        path = as_path(data)
        data_set = _open(path, split, kind)
        check_methods(data_set, methods, compares=against is not None)
        results = evaluate_set(
            _loaded(model, trust),
            data_set,
            against=None if against is None else _loaded(against, trust),
            methods=methods,
            batch_size=batch_size,
        )
        results = {"data": str(path), **results}
    if target is not None:
        write_whole(target, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def _check_alone(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            hint = ", or set evaluation.methods in a config" if name == "methods" else ""
            raise ValueError(f"--{name} has no effect without --data; add it{hint}")


def _open(path: AnyPath, split: str | None, kind: str | None) -> EvaluationSet:
    if split is None:
        return open_set(path, kind=kind)
    if not path.is_dir() or not is_beir(path):
        raise ValueError(f"--split chooses a file of qrels/, but {path} is no BEIR folder")
    return open_set(qrels_file(path, split), kind=kind)


def _loaded(model: _Model, trust: Trust) -> EmbeddingModel:
    return model if isinstance(model, EmbeddingModel) else load(model, trust=trust)


def _of_held_out_rows(
    model: _Model,
    against: _Model | None,
    config: ConfigDict | None,
    changed: Collection[str],
    batch_size: int | None,
    trust: Trust,
) -> dict[str, Any]:
    run, settings, sources = _rows(model, config, changed, trust)
    methods = ranking_methods(settings)
    if against is not None and set(methods) <= {"bm25", "pixels"}:
        raise ValueError(
            f"--against compares models, but evaluation.methods is {methods}, which ranks without "
            "one; add 'dense'"
        )
    check_evaluation(settings, RunData(sources, {}, {}))
    if run is not None:
        contender = Contender(model_of_run(run), run.prompts(sources))
    else:
        contender = Contender(_loaded(model, trust))
    opponent = None if against is None else _opponent(against, sources, trust)
    return evaluate_model(settings, contender, sources, against=opponent, batch_size=batch_size)


class _Rows(NamedTuple):
    """The rows of a config, or of a run."""

    run: OpenedRun | None
    settings: Settings
    sources: dict[str, PairSource]


def _rows(
    model: _Model, config: ConfigDict | None, changed: Collection[str], trust: Trust
) -> _Rows:
    if config is not None:
        settings = read_data_settings(config, changed=changed)
        sources = open_sources(
            settings.data,
            data_dir=shared_folder(settings.run.data_dir),
            open_source=settings.parts.source,
        )
        return _Rows(None, settings, sources)
    if isinstance(model, EmbeddingModel) or not is_run(model):
        raise ValueError(
            f"{model} is not a run with its own data; name the data with --data, or with a config"
        )
    run = open_run(as_path(model), trust=trust)
    return _Rows(run, run.settings, dict(run.sources()))


def _opponent(model: _Model, sources: Mapping[str, PairSource], trust: Trust) -> Contender:
    """The second model. A run uses its rows' prompts in splits that are equal to its own splits."""
    if isinstance(model, EmbeddingModel) or not is_run(model):
        return Contender(_loaded(model, trust))
    run = open_run(as_path(model), trust=trust)
    own = run.made_from["fingerprints"]
    same = {split: one for split, one in sources.items() if own.get(split) == one.fingerprint}
    return Contender(model_of_run(run), run.prompts(same))


if __name__ == "__main__":
    main()
