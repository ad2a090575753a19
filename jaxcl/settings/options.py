"""Names in a config -> functions with their options bound."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

__all__ = ["arguments_of", "bind_options", "changed_config"]


def bind_options(
    what: str,
    name: str,
    known: Mapping[str, Callable],
    options: Mapping[str, Any],
    *,
    not_options: tuple[str, ...] = (),
) -> Callable:
    """The function of a name with its options bound; an unknown name or option is an error."""
    if name not in known:
        raise ValueError(f"{what}.name={name!r} is unknown; use one of {', '.join(known)}")
    function = known[name]
    accepted = [argument for argument in arguments_of(function) if argument not in not_options]
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"{what}.options.{option} is unknown to {name!r}; it knows {', '.join(accepted)}"
            )
    return functools.partial(function, **options)


def arguments_of(function: Callable) -> dict[str, inspect.Parameter]:
    """What can be given by name."""
    # Flax's metaclass hides the signature of a module's constructor.
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_KEYWORD)
    }


def changed_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy with other values, by dotted name; a list becomes a tuple.

    Raises:
      ValueError: if there is no such field, or the value is of another type than the field's.
    """
    changed = config.copy_and_resolve_references()
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        try:
            place = functools.reduce(getattr, parents, changed)
            getattr(place, leaf)  # or it would be made
            setattr(place, leaf, tuple(value) if isinstance(value, list) else value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = str(error.args[0] if error.args else error)  # a KeyError would quote it
            reason = " ".join(said.replace("\\n", " ").replace("\\'", "'").split())
            raise ValueError(f"the setting {name}={value!r} does not fit: {reason}") from error
    return changed
