"""The flags of commands: one spelling, one-line errors, `--help` with an example.

Uses only the standard library, so that parsing flags imports no other package.
"""

import argparse
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NoReturn

from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.printable import printable

__all__ = [
    "CommandParser",
    "add_model_flag",
    "add_process_flags",
    "add_workdir_flag",
    "user_path",
]


class CommandParser(argparse.ArgumentParser):
    """A parser whose `--help` shows the module's docstring, with its example.

    Flags are spelled with dashes; underscores are accepted too. A flag that cannot be parsed ends
    the process with a one-line error. Positional arguments may stand between flags.
    """

    def __init__(
        self, name: str, doc: str | None, *, verbose: bool = True, passes_on: bool = False
    ):
        """Describe a command.

        Args:
          name: the module name after `python -m`.
          doc: the module's docstring: a summary line, then an example and details.
          verbose: whether there is a flag `-v` for `run_command`.
          passes_on: whether unknown arguments are kept in `arguments.rest` for another parser;
            `--help` next to another argument then also counts as unknown.
        """
        summary, _, details = (doc or "").partition("\n")
        super().__init__(
            prog=f"python -m {name}",
            description=summary,
            epilog=details.strip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=not passes_on,
        )
        if verbose:
            help_text = "print the traceback of an error"
            self.add_argument("-v", "--verbose", action="store_true", help=help_text)
        self._passes_on = passes_on
        self._prefixes: list[str] = []

    def add_fields(self, name: str, *, help: str) -> None:
        """Add `--NAME.FIELD VALUE` for any field; `arguments.NAME_fields` lists (field, text)."""
        self._prefixes.append(f"--{name}.")
        self.add_argument(
            f"--{name}.FIELD",
            dest=f"{name}_fields",
            metavar="VALUE",
            type=_field_and_text,
            action="append",
            default=[],
            help=help,
        )

    def parse(self, argv: Sequence[str] | None = None) -> Namespace:
        """Parse `argv`, by default this process's arguments."""
        words = list(self._one_spelling(iter(sys.argv[1:] if argv is None else argv)))
        if not self._passes_on:
            return self.parse_intermixed_args(words)
        if words in (["-h"], ["--help"]):
            self.print_help()
            self.exit()
        arguments, rest = self.parse_known_args(words)
        arguments.rest = rest
        return arguments

    def error(self, message: str) -> NoReturn:
        """Print a one-line error, and exit with code 2."""
        line = f"error: {message}; {self.prog} --help lists the flags"
        print(printable(line), file=sys.stderr)
        sys.exit(2)

    def _one_spelling(self, words: Iterator[str]) -> Iterator[str]:
        """Write flags with dashes, and a field f of `add_fields` as `--NAME.FIELD=f=VALUE`."""
        for word in words:
            if word == "--":
                yield word
                yield from words
                return
            name, separator, value = word.partition("=")
            prefix = next((one for one in self._prefixes if name.startswith(one)), None)
            if prefix is not None:
                if not separator:
                    value = next(words, "--")
                    if value.startswith("--"):
                        self.error(f"{name} needs a value, as in {name}=VALUE")
                yield f"{prefix}FIELD={name.removeprefix(prefix)}={value}"
            elif name.startswith("--"):
                yield name.replace("_", "-") + separator + value
            else:
                yield word


def user_path(text: str) -> AnyPath:
    """Convert a flag's text to a path with `as_path`, for `type=` in `argparse`."""
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_workdir_flag(parser: CommandParser, *, required: bool = True) -> None:
    """Add `--workdir`, the folder of a trained run, and `--trust`."""
    content = "the folder of a run, or WORKDIR/checkpoints/best or WORKDIR/checkpoints/STEP"
    _add_trained_flag(parser, "--workdir", "DIR", content, required=required)


def add_model_flag(parser: CommandParser) -> None:
    """Add `--model`, a folder that `jaxcl.load` can read, and `--trust`."""
    content = "the folder of a run, WORKDIR/checkpoints/best, or a pretrained or exported model"
    _add_trained_flag(parser, "--model", "PATH", content)


def _add_trained_flag(
    parser: CommandParser, name: str, metavar: str, content: str, *, required: bool = True
) -> None:
    parser.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="allow the run to import its encoder or data source from this package",
    )
    parser.add_argument(name, metavar=metavar, type=user_path, required=required, help=content)


def add_process_flags(parser: CommandParser) -> None:
    """Add the flags with which this process joins the other processes of a run."""
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, to run in several processes",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    parser.add_argument(
        "--process-id", type=int, metavar="ID", help="number of this process, counted from 0"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run in several processes that JAX finds itself, as on the hosts of a TPU pod",
    )


def _field_and_text(argument: str) -> tuple[str, str]:
    match = re.fullmatch(r"([^=]+)=(.*)", argument, re.DOTALL)
    if not match:
        raise argparse.ArgumentTypeError("give a field and its value")
    return match[1], match[2]
