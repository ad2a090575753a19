"""Names in a config -> functions with their options bound."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["arguments_of", "bind_options"]


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
