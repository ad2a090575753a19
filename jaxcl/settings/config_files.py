"""Config files: found by name or path, and run."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jaxcl.configs
from jaxcl.host.paths import local_path
from jaxcl.settings.section_reader import did_you_mean

__all__ = ["find_config", "known_configs", "load_config", "read_settings_file"]


def known_configs() -> list[str]:
    """The names of the configs that come with jaxcl."""
    names = {path.stem for folder in jaxcl.configs.__path__ for path in Path(folder).glob("*.py")}
    return sorted(names - {"__init__"})


def find_config(named: str) -> Path:
    """Find the file of a config, given its path or only its name.

    Raises:
      ValueError: if there is no such file, and jaxcl has no config of that name.

    Example:
      >>> find_config("code_search").name
      'code_search.py'
    """
    path = local_path(named)
    if path.is_file():
        return path
    if path.name == named.removesuffix(".py"):
        for folder in jaxcl.configs.__path__:
            candidate = Path(folder) / f"{path.name}.py"
            if candidate.exists():
                return candidate
    known = known_configs()
    raise ValueError(
        f"there is no such file as {path.absolute()}, and no config named {named!r}"
        f"{did_you_mean(path.stem, known)}; jaxcl has {', '.join(known)}"
    )


def load_config(named: str) -> ConfigDict:
    """Load a config.

    Args:
      named: a Python file, or the name of a config of jaxcl; a variant may follow a colon.

    Raises:
      ValueError: if there is no such file, or its `get_config` fails.

    Example:
      >>> load_config("code_search:smoke").steps
      20
    """
    config = _call(named, "get_config")
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {named} does not return a ConfigDict")
    return config


def read_settings_file(named: str) -> dict[str, dict[str, Any]]:
    """Load the settings of a sweep from the function `get_settings` of its file.

    Args:
      named: a Python file, or the name of one of jaxcl's sweeps, optionally with `:variant`.

    Raises:
      ValueError: if there is no such file, or its `get_settings` fails.
    """
    return _call(named, "get_settings")


def _call(named: str, function: str) -> Any:
    """Run a Python file and call one of its functions with the variant."""
    local_path(named)  # otherwise the scheme of a URL would pass for the name of a config
    file, _, variant = named.partition(":")
    path = find_config(file)
    try:
        get: Callable[..., Any] | None = runpy.run_path(str(path)).get(function)
        if callable(get):
            return get(variant) if variant else get()
    except Exception as error:  # the file is a program, which may raise any error
        if isinstance(error, SyntaxError) and error.filename == str(path):
            raise ValueError(
                f"{named} cannot be read as Python, which configs are written in: {error}"
            ) from error
        reason = f"{type(error).__name__}: " if not isinstance(error, ValueError) else ""
        raise ValueError(f"the config cannot be used: {named}: {reason}{error}") from error
    raise ValueError(f"{path} has no function {function}")
