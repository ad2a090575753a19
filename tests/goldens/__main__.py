"""Records golden results, and compares the results of two commits.

    python -m tests.goldens record --to FILE [--only PATTERN] [--jobs 2]
    python -m tests.goldens compare FILE FILE [--only PATTERN] [--tolerance 1e-12]
    python -m tests.goldens list [--only PATTERN]

Record at both commits on one machine, since bits differ between machines; nothing that is recorded
belongs in the repository. PATTERN is a regular expression that is searched in the names of cases.
Recording everything takes 22 CPU minutes: 35 minutes on 2 busy cores of an Intel Xeon.

The exit code of `compare` is 1 if any case differs, and that of `record` is 1 if any case fails.
Give a tolerance where a change may alter rounding: clipping, for example, sums the gradients in the
order of parameter names, so new names can change the last bits of a run. With a tolerance, only the
norm and the sum of each array of a state are compared.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.goldens.comparison import differences
from tests.goldens.recording import about, case_names, record_cases


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "compare":
        return _compare(options.files, only=options.only, tolerance=options.tolerance)
    names = [name for name in case_names() if re.search(options.only, name)]
    if not names:
        print(f"no case matches {options.only!r}")
        return 1
    if options.command == "list":
        print("\n".join(names))
        return 0
    recorded: dict[str, Any] = {"about": about(), "cases": {}}
    try:
        for name, result in record_cases(names, jobs=options.jobs, compiled=options.compiled):
            recorded["cases"][name] = result
    finally:  # keeps finished cases if the rest is interrupted
        options.to.write_text(json.dumps(recorded, indent=1) + "\n")
    failed = [name for name, result in recorded["cases"].items() if "error" in result]
    print(f"{len(names)} cases in {options.to}; {len(failed)} failed")
    return 1 if failed else 0


def _compare(files: list[Path], *, only: str, tolerance: float) -> int:
    ours, theirs = (json.loads(path.read_text()) for path in files)
    found, wanted = (_selected(recorded["cases"], only) for recorded in (ours, theirs))
    for name in sorted(ours["about"].keys() | theirs["about"].keys()):
        values = [recorded["about"].get(name) for recorded in (ours, theirs)]
        if name != "commit" and values[0] != values[1]:
            print(f"warning: {name} is {values[0]} in the first file, {values[1]} in the second")
    if not found or not wanted:
        print(f"no case matches {only!r} in {files[1] if found else files[0]}")
        return 1
    lines = differences(found, wanted, tolerance=tolerance)
    for name, line in lines.items():
        print(f"{name}: {line}")
    counts = collections.Counter(name.split("/")[0] for name in found.keys() | wanted.keys())
    compared = " and ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"{compared} compared: {len(lines)} differ")
    return 1 if lines else 0


def _selected(cases: dict[str, Any], only: str) -> dict[str, Any]:
    return {name: result for name, result in cases.items() if re.search(only, name)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.goldens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="write the results of this commit to a file")
    record.add_argument("--to", type=Path, required=True, metavar="FILE")
    record.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    record.add_argument(
        "--compiled", type=Path, metavar="DIR", help="keep compiled programs for the next recording"
    )
    compare = commands.add_parser("compare", help="list the cases in which two files differ")
    compare.add_argument("files", type=Path, nargs=2, metavar="FILE")
    compare.add_argument(
        "--tolerance", type=float, default=0.0, help="a relative error (default: 0, equal bits)"
    )
    for command in (record, compare, commands.add_parser("list", help="print names of cases")):
        command.add_argument("--only", default="", metavar="PATTERN")
    return parser


if __name__ == "__main__":
    sys.exit(main())
