"""Copy a config with some values changed."""

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

__all__ = ["changed_config"]


def changed_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Copy a config and set some of its fields; a list becomes a tuple.

    Args:
      config: the config to copy.
      changes: dotted name of a field -> the new value.

    Raises:
      ValueError: if there is no such field, if a value does not have the type of its field, or if
        `changes` is not a mapping.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(
            f"changes of a config are {changes!r}; give a mapping, dotted name -> value, such as "
            "{'loss.masks': ['row']}"
        )
    changed = config.copy_and_resolve_references()
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        try:
            section = functools.reduce(getattr, parents, changed)
            getattr(section, leaf)  # otherwise the next line would create it
            setattr(section, leaf, tuple(value) if isinstance(value, list) else value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            message = str(error.args[0] if error.args else error)  # a KeyError would quote it
            reason = " ".join(message.replace("\\n", " ").replace("\\'", "'").split())
            raise ValueError(f"the setting {name}={value!r} does not fit: {reason}") from error
    return changed
