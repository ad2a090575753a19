"""Lists the commands.

python -m jaxcl
"""

import sys

from jaxcl.host.command_names import commands
from jaxcl.host.output import protect_output


def main() -> None:
    """Print a line for each command."""
    protect_output()
    known = commands()
    if sys.argv[1:] not in ([], ["-h"], ["--help"]):
        sys.exit("error: python -m jaxcl takes no arguments; run python -m jaxcl.COMMAND")
    width = max(map(len, known))
    print("usage: python -m jaxcl.COMMAND [flags]\n\ncommands:")
    for name, summary in known.items():
        print(f"  {name:{width}}  {summary}")
    print(
        "\nexample:\n"
        "  python -m jaxcl.train --config configs/code_search.py\n\n"
        "python -m jaxcl.COMMAND --help lists a command's flags."
    )


if __name__ == "__main__":
    main()
