"""The tables of `configs/README.md` match the settings."""

from pathlib import Path
from typing import Annotated, NamedTuple

import pytest

from jaxcl.settings.reference import setting_comments, settings_table, updated
from jaxcl.typing import Range

CONFIGS = Path(__file__).parents[2] / "configs"


class Inner(NamedTuple):
    rate: Annotated[float, Range(above=0)] | None = None


class Outer(NamedTuple):
    steps: Annotated[int, Range(least=1)] = 3
    optimizer: Inner = Inner()


def test_the_tables_in_the_configs_folder_are_those_of_the_settings():
    readme, source = ((CONFIGS / name).read_text() for name in ("README.md", "base.py"))
    assert updated(readme, source) == readme, "run: python -m jaxcl.settings.reference configs"


def test_a_changed_default_changes_the_table():
    readme, source = ((CONFIGS / name).read_text() for name in ("README.md", "base.py"))
    assert updated(readme.replace("| `seed` | `0`", "| `seed` | `1`"), source) == readme


def test_a_row_has_the_default_the_range_and_the_comment():
    table = settings_table(
        "config.steps = 3  # updates\noptimizer.rate = 1  # peak", settings=Outer
    )
    assert table.splitlines()[2:] == [
        "| `steps` | `3` | integer, at least 1 | updates |",
        "| `optimizer.rate` | `None` | number, above 0 or `None` | peak |",
    ]


def test_a_section_with_a_comment_explains_its_settings():
    table = settings_table("config.steps = 3  # updates\n# Adam\noptimizer = {}\n", settings=Outer)
    assert table.splitlines()[3] == "| *`optimizer`* | | | Adam |"


def test_a_setting_without_a_comment_is_an_error():
    with pytest.raises(ValueError, match=r"no comment for optimizer\.rate"):
        settings_table("config.steps = 3  # updates", settings=Outer)


def test_comments_above_and_after_an_assignment_belong_to_it():
    source = "x = 1  # not this\n# above\n# it\nconfig.steps = {\n    'a': 1,  # after\n}\n"
    assert setting_comments(source)["steps"] == "above it after"
