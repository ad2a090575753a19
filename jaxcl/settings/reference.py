"""The reference of all settings: a table of their defaults, ranges and meanings.

    python -m jaxcl.settings.reference configs

regenerates the tables of `configs/README.md`. Names, types and ranges come from `Settings`, and
meanings from the comments of `configs/base.py`.
"""

import ast
import io
import re
import sys
import tokenize
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from jaxcl.losses import LOSSES
from jaxcl.models import ENCODERS
from jaxcl.models.augmentations import AUGMENTATIONS
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.sections import Settings
from jaxcl.typing import Range

__all__ = ["option_table", "setting_comments", "settings_table", "updated"]

_REGISTRIES: Mapping[str, Mapping[str, Any]] = {
    "model": ENCODERS,
    "loss": LOSSES,
    "augmentation": AUGMENTATIONS,
    "optimizer": OPTIMIZERS,
}
"""Section with `options` -> the parts that have such options."""

_SECTION_OF = {
    "config": "",
    "files": "data.files",
    "gcbs": "assignment.gcbs",
    "images": "data.images",
    "lora": "model.lora",
}
"""Variable of `configs/base.py` -> the section it holds, if the section has another name."""


_NOT_IN_BASE = {"data.code_pairs": "Options of `data.name=code_pairs`; see `code_search.py`."}


class _Setting(NamedTuple):
    name: str
    default: Any
    values: str


def settings_table(source: str, *, settings: type = Settings) -> str:
    """The settings as a Markdown table.

    Args:
      source: the text of `configs/base.py`, whose comments explain the settings.
      settings: a NamedTuple class, such as `Settings`.

    Returns:
      The table: name, default, values, meaning. A section with a comment has a row before its
      settings.

    Raises:
      ValueError: for a setting that neither has a comment nor lies in a section with one.
    """
    comments = setting_comments(source) | _NOT_IN_BASE
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    explained = set()
    missing = [name for name, *_ in _settings(settings, "") if not _explained(name, comments)]
    if missing:
        raise ValueError(f"configs/base.py has no comment for {', '.join(missing)}")
    for setting in _settings(settings, ""):
        sections = [name for name in _sections_of(setting.name) if name in comments]
        for section in sections:
            if section not in explained:
                explained.add(section)
                rows.append(f"| *`{section}`* | | | {_cell(comments[section])} |")
        meaning = _cell(comments.get(setting.name, ""))
        default = f"`{setting.default!r}`"
        rows.append(f"| `{setting.name}` | {default} | {_cell(setting.values)} | {meaning} |")
    return "\n".join(rows) + "\n"


def option_table(parts: Mapping[str, Any]) -> str:
    """The options of a registry, such as `LOSSES`, as a Markdown table.

    Args:
      parts: name -> a part with `options`, a NamedTuple class or `None`.
    """
    values: dict[str, str] = {}
    users: dict[str, list[str]] = {}
    for part, described in parts.items():
        for setting in _settings(described.options, "") if described.options else ():
            values[setting.name] = setting.values
            users.setdefault(setting.name, []).append(f"`{part}`")
    rows = ["| option | values | used by |", "|---|---|---|"]
    rows += [f"| `{name}` | {_cell(values[name])} | {', '.join(users[name])} |" for name in users]
    return "\n".join(rows) + "\n"


def setting_comments(source: str) -> dict[str, str]:
    """Find the comment of each assignment to a config.

    A comment may be in the lines directly above the assignment, and at the end of its lines.

    Args:
      source: the text of a config file like `configs/base.py`.

    Returns:
      Dotted name of a setting or a section -> its comment.
    """
    comments = {
        token.start[0]: token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    descriptions = {}
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Assign):
            continue
        name = _dotted(statement.targets[0])
        last = statement.end_lineno or statement.lineno
        first = statement.lineno
        while (above := comments.get(first - 1)) and not above.line[: above.start[1]].strip():
            first -= 1
        lines = [line for line in range(first, last + 1) if line in comments]
        if name and lines:
            texts = (comments[line].string.lstrip("# ") for line in lines)
            descriptions[name] = " ".join(texts)
    return descriptions


def _dotted(target: ast.expr) -> str:
    """The dotted name of an assignment's target; a section's variable stands for the section."""
    names: list[str] = []
    while isinstance(target, ast.Attribute):
        names.insert(0, target.attr)
        target = target.value
    if not isinstance(target, ast.Name):
        return ""
    section = _SECTION_OF.get(target.id, target.id)
    return ".".join([section, *names] if section else names)


def _explained(name: str, comments: Mapping[str, str]) -> bool:
    return any(one in comments for one in (name, *_sections_of(name)))


def _sections_of(name: str) -> list[str]:
    """The sections around a setting, from the outside."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _settings(section: Any, path: str) -> Iterator[_Setting]:
    """The settings of a section and of the sections inside it."""
    defaults = section._field_defaults
    for name, hint in get_type_hints(section, include_extras=True).items():
        dotted = f"{path}.{name}" if path else name
        if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
            if name != "parts":
                yield from _settings(hint, dotted)
        elif dotted.rpartition(".")[2] != "options":
            yield _Setting(dotted, defaults.get(name), _values(hint))


def _values(hint: Any) -> str:
    """The values of a type, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [
            str(note).removeprefix("to ") for note in arguments[1:] if isinstance(note, Range)
        ]
        if ranges == ["a finite number"]:
            return "finite number"
        return ", ".join([_values(arguments[0]), *ranges])
    if origin in (Union, types.UnionType):
        kinds = [_values(one) for one in arguments if one is not type(None)]
        return " or ".join([*kinds, *(["`None`"] if type(None) in arguments else [])])
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"tuple of {_several(arguments[0])}"
        return f"({'; '.join(map(_values, arguments))})"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping from names to {_several(arguments[1])}"
    names = {bool: "`True`, `False`", int: "integer", float: "number", str: "string"}
    if isinstance(hint, type) and hasattr(hint, "_fields"):
        return ", ".join(f"`{name}`" for name in hint._fields)
    return names.get(hint, "any")


def _several(hint: Any) -> str:
    """The values of each element of a collection, in words."""
    return "strings" if hint is str else f"({_values(hint)})"


def _bounded(allowed: Range) -> bool:
    return any(bound is not None for bound in allowed[:4])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def updated(readme: str, source: str) -> str:
    """The text of `configs/README.md` with its tables regenerated.

    Args:
      readme: the text. `<!-- settings -->` or `<!-- options of NAME -->` precedes each table.
      source: the text of `configs/base.py`.
    """
    tables = {"settings": settings_table(source)}
    tables |= {f"options of {name}": option_table(parts) for name, parts in _REGISTRIES.items()}
    for name, table in tables.items():
        begin, mark, rest = readme.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"configs/README.md lacks the line <!-- {name} -->")
        rest = re.sub(r"\A(\|.*\n)*", "", rest)  # the previous table
        readme = f"{begin}{mark}{table}{rest}"
    return readme


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    text = updated((folder / "README.md").read_text(), (folder / "base.py").read_text())
    (folder / "README.md").write_text(text)
