"""Evaluates the retrieval of any model on held-out pairs next to BM25, as at the end of training.

    python -m jaxcl.evaluate --model runs/code_search
    python -m jaxcl.evaluate --model runs/code_search --config configs/code_search.py

The model is anything that `jaxcl.load` accepts: the workdir of a run, an exported folder, or a
pretrained model as a baseline before training. It embeds texts with its own tokenizer, limits and
prompts. The config sets the data and the methods that rank keys; without a config, a run is
evaluated on its own data. Each query ranks all keys of its split.

In a program or a notebook, call `evaluate`:

    evaluate("runs/code_search", config=load_config("code_search"))
"""

import json
import os
from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxcl.data.prepare import RunData, open_sources
from jaxcl.evaluation.held_out import check_evaluation, evaluate_model
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_model_flag, user_path
from jaxcl.host.files import write_whole
from jaxcl.host.paths import as_path
from jaxcl.host.user_folders import shared_folder
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.load_model import is_run, load, model_of_run
from jaxcl.run.opened import open_run
from jaxcl.run.watch import keep_compiled
from jaxcl.settings.command_line import add_config_flags, changed_fields, optional_config_of
from jaxcl.settings.parts import Trust
from jaxcl.settings.read import read_data_settings

__all__ = ["evaluate", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.evaluate", __doc__)
    add_model_flag(parser)
    add_config_flags(parser, required=False)
    parser.add_argument(
        "--output", metavar="FILE", type=user_path, help="write the results to a JSON file"
    )
    parser.add_argument("--batch-size", type=int, help="number of texts to embed at once")
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    keep_compiled()
    evaluate(
        arguments.model,
        config=optional_config_of(arguments),
        changed=changed_fields(arguments),
        output=arguments.output,
        batch_size=arguments.batch_size,
        trust=arguments.trust,
    )


def evaluate(
    model: str | os.PathLike[str] | EmbeddingModel,
    *,
    config: ConfigDict | None = None,
    changed: Collection[str] = (),
    output: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    trust: Trust = (),
) -> dict[str, Any]:
    """Evaluate the retrieval of a model on held-out pairs, and print a table.

    Args:
      model: a model, or a path for `jaxcl.load`.
      config: names the rows (`data`) and the methods (`evaluation`); `None` uses the config of the
        run in `model`.
      changed: dotted names of the fields that the user changed; one without effect is an error.
      output: a JSON file for the results.
      batch_size: as `EmbeddingModel.encode`.
      trust: packages whose code the run may name.

    Returns:
      The results, as in the file: means and standard errors by split, variant and method.

    Raises:
      ValueError: if there is no model, the data have no held-out split, or `config` is `None` and
        `model` is not the workdir of a run.
      OSError: if a file cannot be read or written.
      CheckpointError: if no checkpoint of a run can be read.
    """
    target = None if output is None else as_path(output)
    if isinstance(target, Path) and not target.parent.is_dir():  # fail before the work
        raise FileNotFoundError(f"the folder {target.parent} for the output does not exist")
    prompts = None
    if config is not None:
        settings = read_data_settings(config, changed=changed)
        sources = open_sources(
            settings.data,
            data_dir=shared_folder(settings.run.data_dir),
            open_source=settings.parts.source,
        )
    elif isinstance(model, EmbeddingModel) or not is_run(model):
        raise ValueError(f"{model} is not a run with its own data; name the data with a config")
    else:
        run = open_run(as_path(model), trust=trust)
        settings, sources, model = run.settings, run.sources(), model_of_run(run)
        prompts = run.prompts(sources)
    check_evaluation(settings, RunData(sources, {}, {}))
    if not isinstance(model, EmbeddingModel):
        model = load(model, trust=trust)
    results = evaluate_model(settings, model, sources, batch_size=batch_size, prompts=prompts)
    if target is not None:
        write_whole(target, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


if __name__ == "__main__":
    main()
