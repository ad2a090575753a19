"""The reader that turns a section of a config into its NamedTuple.

A numeric setting states its range where it is defined:

    class OptimizerSettings(NamedTuple):
        learning_rate: Annotated[float, Range(above=0)] = 1e-3

`read_section` then checks names, types and ranges of a whole section.
"""

import difflib
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from jaxcl.typing import Range

__all__ = ["did_you_mean", "read_section"]

T = TypeVar("T", bound=tuple)


def read_section(section: type[T], given: Mapping[str, Any], *, path: str = "") -> T:
    """Read a section of a config into its NamedTuple.

    Missing fields take the default of the NamedTuple. Sections nest, lists become tuples, and an
    integer is accepted where a float is declared.

    Args:
      section: a NamedTuple class, whose annotations the values must fit. Annotations may be bool,
        int, float, str, `Any`, NamedTuples, tuples, mappings with string keys, unions of these, and
        `Annotated[number, Range(…)]`.
      given: the values by name.
      path: the dotted name of the section, for messages.

    Raises:
      ValueError: for an unknown name, a value of another type, or one outside its range. The
        message names the setting.

    Example:
      >>> from typing import NamedTuple
      >>> class Steps(NamedTuple):
      ...     count: Annotated[int, Range(least=1)] = 10
      >>> read_section(Steps, {"count": 3})
      Steps(count=3)
    """
    hints = get_type_hints(section, include_extras=True)
    fields = section._fields  # type: ignore[attr-defined] # a NamedTuple's
    for name in given:
        if name not in fields:
            raise ValueError(
                f"{_dotted(path, name)} is unknown{did_you_mean(name, fields)}; "
                f"{path or 'a config'} has {', '.join(fields)}"
            )
    values = {
        name: _converted(given[name], hints[name], _dotted(path, name))
        for name in fields
        if name in given
    }
    return section(**values)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A suggestion for a message about an unknown name, or an empty string."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _converted(value: Any, hint: Any, path: str) -> Any:
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin is Annotated:
        kind, *notes = get_args(hint)
        number = _converted(value, kind, path)
        for note in notes:
            if isinstance(note, Range):
                note.check(path, number)
        return number
    if origin in (Union, types.UnionType):
        return _of_union(value, get_args(hint), path)
    if origin is tuple:
        return _as_tuple(value, get_args(hint), path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type(path, value, "a mapping")
        return {
            str(name): _converted(one, get_args(hint)[1], _dotted(path, str(name)))
            for name, one in value.items()
        }
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        if not isinstance(value, Mapping):
            fields = ", ".join(hint._fields)
            raise _wrong_type(path, value, f"a ConfigDict with {fields}")
        return read_section(hint, value, path=path)
    return _scalar(value, hint, path)


def _of_union(value: Any, kinds: Iterable[Any], path: str) -> Any:
    """Convert a value to the first type of a union that accepts it; `None` must be declared."""
    kinds = list(kinds)
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _converted(value, kind, path)
        except ValueError:
            continue
    return _converted(value, others[-1], path)


def _as_tuple(value: Any, kinds: tuple[Any, ...], path: str) -> tuple:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise _wrong_type(path, value, "a tuple")
    values = tuple(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_converted(one, kinds[0], path) for one in values)
    if len(values) != len(kinds):
        raise _wrong_type(path, value, f"a tuple of {len(kinds)}")
    return tuple(_converted(one, kind, path) for one, kind in zip(values, kinds, strict=True))


def _scalar(value: Any, kind: type, path: str) -> Any:
    if kind is bool:
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        raise _wrong_type(path, value, "True or False")
    is_bool = isinstance(value, (bool, np.bool_))
    if kind is int and isinstance(value, (int, np.integer)) and not is_bool:
        return int(value)
    if kind is float and isinstance(value, (int, float, np.number)) and not is_bool:
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    raise _wrong_type(path, value, {int: "an integer", float: "a number", str: "a text"}[kind])


def _wrong_type(path: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{path}={value!r}; set it to {wanted}")
