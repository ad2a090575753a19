"""The commands of jaxcl, found without importing them."""

import ast
import signal
import sys
from pathlib import Path

from jaxcl.host.extras import missing_message

__all__ = ["commands", "refuse_other_modules"]

_PACKAGE = Path(__file__).parents[1]


def commands() -> dict[str, str]:
    """The summary line of each command, by the command's name without `jaxcl.`."""
    files = {path.stem: path for path in _PACKAGE.glob("*.py") if path.stem != "__main__"}
    files |= {path.parent.name: path for path in _PACKAGE.glob("*/__main__.py")}
    return {name: _summary(path) for name, path in sorted(files.items()) if _runs(path)}


def refuse_other_modules() -> None:
    """Exit with an error message if `python -m` is about to run a jaxcl module that cannot run.

    The module is either not a command, so that Python would import it and do nothing, or a command
    whose extra is not installed. For other commands, this also makes Ctrl-C during their imports
    exit without a traceback.
    """
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:  # "-m" until Python finds the module
        return
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]
    if not module or module[0].split(".")[0] != "jaxcl":
        return
    base = _PACKAGE.joinpath(*module[0].split(".")[1:])
    file = base / "__main__.py" if base.is_dir() else base.with_suffix(".py")
    exists = file.exists() or base.is_dir()
    if exists and not (file.exists() and _runs(file)):
        sys.exit(f"error: {module[0]} is not a command; python -m jaxcl lists the commands")
    is_root_command = file.parent == _PACKAGE and file.name != "__main__.py" and file.exists()
    if is_root_command and (missing := missing_message()) is not None:
        sys.exit(f"error: {module[0]} {missing}")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _runs(path: Path) -> bool:
    """Whether a file can be run as a command."""
    return path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text("utf-8")


def _summary(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
