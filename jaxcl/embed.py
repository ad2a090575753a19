"""Embeds the texts of a file, of any size, and writes the embeddings to a file.

    python -m jaxcl.embed --model runs/code_search --input texts.txt --output vectors.npy

The model is anything that `jaxcl.load` accepts. The texts are the lines of a `.txt` file, a field
of JSON lines (`.jsonl`) or a column of a table (`.csv`, `.tsv`, `.parquet`); `-` reads lines from
standard input. Row i of the output is the embedding of text i, in a `.npy` file or in the column
`embedding` of a `.parquet` file. The output appears once it is complete. Memory does not grow with
the input.

    python -m jaxcl.embed --model runs/code_search --side key --input code.jsonl --field code \\
        --output code.parquet --quantize int8

In a program or a notebook, call `embed`, or `jaxcl.load(PATH).encode` for texts in memory:

    embed("runs/code_search", "texts.txt", "vectors.npy")
"""

import functools
import os
from argparse import Namespace
from collections.abc import Sequence

from jaxcl.data.text_files import TEXT_FILES, read_texts
from jaxcl.data.vector_files import VECTOR_FILES, write_vectors
from jaxcl.host.command import run_command
from jaxcl.host.command_flags import CommandParser, add_model_flag, user_path
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.progress import progress_bar, say
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.host_vectors import QUANTIZATIONS
from jaxcl.run.load_model import load
from jaxcl.run.watch import keep_compiled
from jaxcl.settings.parts import Trust
from jaxcl.typing import SIDES

__all__ = ["embed", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = CommandParser("jaxcl.embed", __doc__)
    add_model_flag(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help=f"the texts: {', '.join(TEXT_FILES)}, or - for standard input",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        type=user_path,
        help=f"the file to write, {' or '.join(VECTOR_FILES)}",
    )
    parser.add_argument(
        "--field", default="text", help="field or column of the texts (default: text)"
    )
    parser.add_argument(
        "--side", choices=SIDES, default="query", help="side of the texts (default: query)"
    )
    parser.add_argument("--prompt", help="a prompt or its name, instead of the side's prompt")
    parser.add_argument("--batch-size", type=int, help="number of texts per batch")
    parser.add_argument("--dim", type=int, help="number of leading dimensions to keep")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="type of the values to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    run_command(parser, _run, argv)


def _run(arguments: Namespace) -> None:
    keep_compiled()
    options = {name: value for name, value in vars(arguments).items() if name != "verbose"}
    num_texts = embed(options.pop("model"), options.pop("input"), options.pop("output"), **options)
    say(f"wrote {num_texts:,} vectors to {arguments.output}")


def embed(
    model: str | os.PathLike[str] | EmbeddingModel,
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    field: str = "text",
    side: str = "query",
    prompt: str | None = None,
    batch_size: int | None = None,
    dim: int | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    trust: Trust = (),
) -> int:
    """Embed the texts of a file.

    Args:
      model: a model, or a path for `jaxcl.load`.
      input: a file with a suffix in `jaxcl.data.text_files.TEXT_FILES`; `"-"` is standard input.
      output: the file to write, `.npy` or `.parquet`.
      field: the field of the texts in JSON lines, or the column of the texts in a table.
      side, prompt, batch_size, dim, quantize: as for `EmbeddingModel.encode`.
      overwrite: whether to replace the output if it exists.
      trust: packages from which an encoder named `package.module:function` may be imported.

    Returns:
      The number of texts.

    Raises:
      FileExistsError: if the output exists and `overwrite` is false.
      ValueError: for an unknown suffix, a line without a text, or arguments that
        `EmbeddingModel.encode` rejects.
      OSError: if a file cannot be read or written.
    """
    source = None if os.fspath(input) == "-" else as_path(input)
    blocks = read_texts(source, field=field, kind=".txt" if source is None else None)
    output = as_path(output)
    _check_output(source, output, overwrite=overwrite)
    if not isinstance(model, EmbeddingModel):
        model = load(model, trust=trust)
    encode = functools.partial(
        model.encode, side=side, prompt=prompt, batch_size=batch_size, dim=dim, quantize=quantize
    )
    empty = encode([])
    with (
        progress_bar("embedding", None) as advance,
        write_vectors(output, width=empty.shape[1], dtype=empty.dtype) as write,
    ):
        num_texts = 0
        for texts in blocks:
            write(encode(texts, progress=advance))
            num_texts += len(texts)
    return num_texts


def _check_output(source: AnyPath | None, output: AnyPath, *, overwrite: bool) -> None:
    """Check the paths before any text is embedded."""
    if output.suffix not in VECTOR_FILES:
        raise ValueError(
            f"--output={output} has an unknown suffix; use {' or '.join(VECTOR_FILES)}"
        )
    if source is not None and not source.exists():
        raise FileNotFoundError(f"there is no file {source}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another name, or add --overwrite")
    if source is not None and output.exists() and output.samefile(source):
        raise ValueError(f"{output} is also the input; choose another name for the output")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for the output; create it")


if __name__ == "__main__":
    main()
