"""Options of encoders and augmentations, declared once: in the signatures of their functions."""

import collections
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

__all__ = ["option_class", "options_of"]


def options_of(function: Callable) -> type:
    """The options of a function or class: its keyword-only arguments with a default.

    Args:
      function: its annotations give the types, with the `jaxcl.typing.Range` of each number.

    Example:
      >>> from jaxcl.typing import Rate
      >>> def mask(*, rate: Rate = 0.15, span_length: int = 3): ...
      >>> options_of(mask)(rate=0.5)
      Options(rate=0.5, span_length=None)
    """
    # An encoder's metaclass hides the signature of its constructor.
    signed = vars(function)["__init__"] if isinstance(function, type) else function
    hints = get_type_hints(signed, include_extras=True)
    return option_class(
        {
            name: hints[name]
            for name, parameter in inspect.signature(signed).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        }
    )


def option_class(kinds: Mapping[str, Any]) -> type:
    """A NamedTuple class with these options, each `None` for the default of the function.

    Args:
      kinds: name of an option -> its type, with a `jaxcl.typing.Range` for a number.
    """
    options: Any = collections.namedtuple("Options", kinds, defaults=[None] * len(kinds))  # type: ignore[misc] # the names are not known to mypy
    options.__annotations__ = {name: kind | None for name, kind in kinds.items()}
    return options
