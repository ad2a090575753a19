"""The parser of a benchmark's flags."""

from jaxcl.host.command_flags import CommandParser

__all__ = ["add_training_flags", "benchmark_parser"]


def benchmark_parser(name: str, doc: str | None) -> CommandParser:
    """Create the parser for a benchmark's flags, given its module's docstring."""
    more = "Every benchmark also takes --json FILE, and -v for the traceback of an error."
    return CommandParser(f"jaxcl.bench {name}", f"{doc}\n{more}", verbose=False)


def add_training_flags(parser: CommandParser) -> None:
    """Add the number of seeds, and the interpreter of the training to compare with."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--torch-python",
        help="an interpreter with sentence-transformers (default: measure jaxcl only)",
    )
