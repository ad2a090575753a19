"""Exports the model of a trained run to a folder, for sentence-transformers, jaxcl or peft.

    python -m jaxcl.export --workdir runs/code_search --to models/code_search

The folder holds the parameters of the newest checkpoint, the tokenizer and a model card. It can be
used without the run or its data. `SentenceTransformer(DIR)` loads a fine-tuned encoder of texts,
both towers of a fine-tuned CLIP, or a static encoder without position weights. Export any other
model with `--format jaxcl`, for `jaxcl.load`. Low-rank adapters are merged into the kernels, or
exported alone with `--format peft`. To export the best checkpoint by `evaluation.best_metric`, give
`--workdir runs/code_search/checkpoints/best`.

In a program or a notebook, call `export`:

    export("runs/code_search", "models/code_search")
"""

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_workdir_flag
from jaxcl.host.paths import as_path, local_path
from jaxcl.host.progress import say
from jaxcl.run.adapter_folder import adapter_files
from jaxcl.run.exported import jaxcl_files
from jaxcl.run.model_card import model_card
from jaxcl.run.model_files import ModelFiles, check_free, write_folder
from jaxcl.run.opened import OpenedRun, open_run
from jaxcl.run.sentence_transformers import sentence_transformers_files
from jaxcl.settings.parts import Trust

__all__ = ["FORMATS", "export", "main"]

FORMATS: Mapping[str, Callable[[OpenedRun, np.dtype | None], ModelFiles]] = {
    "sentence-transformers": sentence_transformers_files,
    "jaxcl": jaxcl_files,
    "peft": adapter_files,
}
"""Maps each value of `--format` to the function that collects the files of the folder."""

DTYPES = ("float32", "bfloat16", "float16")
"""The types that exported parameters can have."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.export", __doc__)
    add_workdir_flag(parser)
    parser.add_argument(
        "--to", metavar="DIR", required=True, help="the folder to write; it must be new or empty"
    )
    parser.add_argument(
        "--format",
        default=next(iter(FORMATS)),
        help=f"{', '.join(FORMATS)} (default: {next(iter(FORMATS))})",
    )
    parser.add_argument(
        "--dtype",
        help=f"type of the parameters: {', '.join(DTYPES)} (default: as in the model)",
    )
    parser.add_argument(
        "--weights",
        help="trained, or average, the moving average of optimizer.average_decay (default: those "
        "of the run's evaluation.weights)",
    )
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    folder = export(
        arguments.workdir,
        arguments.to,
        format=arguments.format,
        dtype=arguments.dtype,
        weights=arguments.weights,
        trust=arguments.trust,
    )
    say(f"{folder} holds the model; its README.md says how to load it")


def export(
    workdir: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    format: str = "sentence-transformers",
    dtype: str | None = None,
    weights: str | None = None,
    trust: Trust = (),
) -> Path:
    """Write the model of a run's checkpoint to a folder.

    Args:
      workdir: the workdir of a run, for its newest checkpoint, or `WORKDIR/checkpoints/best` or
        `WORKDIR/checkpoints/STEP`. The run may still be training.
      to: the folder to write, which must be new or empty. It is written completely or not at all.
      format: one of `FORMATS`.
      dtype: type of the parameters in the files, one of `DTYPES`; `None` for their own types, or
        for the types in a pretrained model's files if they hold the trained values.
      weights: `"trained"`, or `"average"` for the moving average of the weights; `None` for the
        weights of the run's `evaluation.weights`.
      trust: packages from which an encoder named `package.module:function` may be imported.

    Returns:
      The folder.

    Raises:
      ValueError: for an unknown format or type, a model that the format does not support, or
        parameters too large for the type, or if the workdir has no run with a checkpoint.
      FileExistsError: if the folder is not empty.
      OSError: if the folder cannot be written.
      CheckpointError: if no checkpoint can be read.
      PermissionError: for an encoder from a package that is not trusted.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    folder = local_path(to).resolve()
    check_free(folder)
    run = open_run(as_path(workdir), trust=trust, weights=weights)
    files = FORMATS[format](run, None if dtype is None else jnp.dtype(dtype))
    card = model_card(run, name=folder.name, library=format).encode()
    write_folder(folder, files._replace(contents={**files.contents, "README.md": card}))
    return folder


if __name__ == "__main__":
    main()
