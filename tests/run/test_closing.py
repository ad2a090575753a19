"""The last line of a run names commands that work with its model."""

from pathlib import Path

import pytest

from jaxcl.run.opening import closing
from jaxcl.settings.changed import changed_config
from jaxcl.settings.config_files import load_config
from jaxcl.settings.read import read_settings


@pytest.mark.parametrize(
    ("config", "changes", "query", "ending"),
    [
        ("pairs", {"data.name": "pairs.jsonl"}, "QUERY", "--to FOLDER --format jaxcl"),
        (
            "pairs",
            {"data.name": "pairs.jsonl", "data.distinct_tokens": False}
            | {"model.options.position_weights": False},
            "QUERY",
            "--to FOLDER",
        ),
        ("simclr", {}, "--image FILE", "--to FOLDER --format jaxcl"),
        ("image_text", {}, "QUERY", "--to FOLDER --format jaxcl"),
    ],
)
def test_the_commands_fit_the_model(config, changes, query, ending):
    settings = read_settings(changed_config(load_config(config), changes))
    (line,) = closing(settings, Path("runs/mine"), 3, None)
    assert f"jaxcl.search --workdir runs/mine {query}," in line
    assert line.endswith(f"jaxcl.export --workdir runs/mine {ending}")
