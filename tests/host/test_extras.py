"""A command without its extra names the extra to install."""

import importlib.util
import sys

import pytest

from jaxcl.host import command_names, extras


def test_with_everything_installed_nothing_is_missing():
    assert extras.missing_message() is None


@pytest.fixture
def without_optax(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optax" else find(name)
    )


def test_missing_packages_are_named_with_their_extra(without_optax):
    assert extras.missing_message() == "needs optax: pip install 'jaxcl[train]'"


@pytest.mark.parametrize(("module", "stops"), [("jaxcl.train", True), ("jaxcl", False)])
def test_a_command_stops_where_its_extra_is_missing(without_optax, monkeypatch, module, stops):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", module])
    if not stops:
        command_names.refuse_other_modules()
        return
    with pytest.raises(SystemExit, match=r"jaxcl\.train needs optax: pip install 'jaxcl\[train\]'"):
        command_names.refuse_other_modules()
