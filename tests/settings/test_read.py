"""A config is read once: all fields are checked, and names become functions."""

import math
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import optax
import pytest

from jaxcl.configs import base, code_search
from jaxcl.losses import LOSSES, infonce_loss
from jaxcl.models import ENCODERS
from jaxcl.models.augmentations import AUGMENTATIONS
from jaxcl.settings.effects import _UNREAD, check_effects
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.read import as_dict, read_settings
from jaxcl.settings.sections import Parts, Settings, unresolved
from jaxcl.typing import Range

LIMITS = (-1, 0, 2**31, 2**70, 1e300, -math.inf, math.inf, math.nan)


KINDS: dict[str, type] = {}
"""Whether a number with a range is an int or a float."""


def numbers(section: type, path: str = "") -> Iterator[tuple[str, Range | None]]:
    """The dotted name and the range of each number in a section."""
    for name, hint in get_type_hints(section, include_extras=True).items():
        yield from numbers_of_hint(hint, f"{path}{name}")


def numbers_of_hint(hint: Any, path: str) -> Iterator[tuple[str, Range | None]]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = next((note for note in arguments[1:] if isinstance(note, Range)), None)
        yield path, limits
        KINDS[path] = arguments[0]
    elif origin in (Union, types.UnionType, tuple):
        for one in arguments:
            yield from numbers_of_hint(one, path)
    elif origin is Mapping:
        yield from numbers_of_hint(arguments[1], path)
    elif hint in (int, float):
        yield path, None
    elif isinstance(hint, type) and hasattr(hint, "_fields") and hint is not Parts:
        yield from numbers(hint, f"{path}.")


NUMBERS = dict(numbers(Settings))


def config_with(path: str, value: Any) -> dict[str, Any]:
    """A config with one number, in a tuple or a mapping if the setting is one."""
    wrapped = {
        "data.images.background": lambda: (value, 0, 0),
        "loss.matryoshka_dims": lambda: (value,),
        "negatives.mined.rank_range": lambda: (value, 5),
        "negatives.weights": lambda: ((0, value),),
        "assignment.sourced.weights": lambda: ((0, value),),
        "optimizer.clip_groups": lambda: (("*", value),),
        "optimizer.rates": lambda: (("*", value),),
        "run.mesh": lambda: {"data": value},
        "run.parameter_rules": lambda: (("kernel", value),),
    }
    *parents, leaf = path.split(".")
    config: dict[str, Any] = {}
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = wrapped.get(path, lambda: value)()
    return config


def test_the_commented_base_has_the_declared_defaults():
    assert as_dict(read_settings(base.get_config())) == as_dict(read_settings({}))


def test_every_number_has_a_range():
    assert len(NUMBERS) > 50
    assert {path for path, limits in NUMBERS.items() if limits is None} == set()


@pytest.mark.parametrize("path", sorted(NUMBERS))
def test_a_number_out_of_its_range_is_refused_by_name(path):
    refused = 0
    for limit in LIMITS:
        value = float(limit) if KINDS[path] is float else limit
        try:
            NUMBERS[path].check(path, value)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=re.escape(path)):
                read_settings(config_with(path, value))
    assert refused >= 4  # NaN, and numbers that int32 or float32 cannot hold


@pytest.mark.parametrize(("value", "limit"), [(2**31, 2**31 - 1), (1e39, 3.4028234663852886e38)])
def test_a_number_that_jax_cannot_hold_is_too_large(value, limit):
    Range(least=0).check("size", limit)
    with pytest.raises(
        ValueError, match=re.escape(f"size={value} is too large; set it to at most {limit}")
    ):
        Range(least=0).check("size", value)


REGISTRIES = {
    "model": ENCODERS,
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "augmentation": AUGMENTATIONS,
}


@pytest.mark.parametrize("section", REGISTRIES)
def test_every_number_of_an_option_has_a_range(section):
    for name, part in REGISTRIES[section].items():
        for option, limits in numbers(part.options):
            assert limits is not None, (name, option)


def test_settings_round_trip_through_json():
    settings = read_settings(code_search.get_config())
    assert read_settings(as_dict(settings)) == settings


def test_a_field_of_no_section_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.rate is unknown"):
        read_settings({"optimizer": {"rate": 1}})
    with pytest.raises(ValueError, match="parts is not a field of a config"):
        read_settings({"parts": {}})


def test_only_a_changed_setting_without_effect_is_an_error():
    settings = read_settings({})  # with the defaults, most of these settings are not read
    tried = 0
    for unread in _UNREAD:
        for field in unread.fields:
            if unread.holds(settings):
                tried += 1
                name = field + "name" if field.endswith(".") else field
                with pytest.raises(ValueError, match=f"{name} has no effect here"):
                    check_effects(settings, [name])
    assert tried > 15
    check_effects(settings, ["steps", "loss.margin", "assignment.name"])
    queue = {"bank": {"kind": "queue", "slots": 7}, "tiers": {"full_bank": True}}
    read_settings(
        {"negatives": queue}, changed=["negatives.bank.slots", "negatives.tiers.full_bank"]
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"resize": "pad"}, r"data\.images\.resize='pad' is unknown; use crop or stretch"),
        ({"bad": "drop"}, r"data\.images\.bad='drop' is unknown; use error or skip"),
        ({"background": (0, 0)}, r"data\.images\.background=\(0, 0\); set it to a tuple of 3"),
    ],
)
def test_invalid_settings_of_images_are_errors(images, message):
    with pytest.raises(ValueError, match=message):
        read_settings({"data": {"images": images}})


def test_a_name_may_be_a_function_of_a_package(tmp_path, monkeypatch):
    schedule = "import optax\n\ndef flat(peak, **_):\n    return optax.constant_schedule(peak)\n"
    (tmp_path / "own_schedules.py").write_text(schedule)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "loss": {"name": "jaxcl.losses:infonce_loss", "options": {"hardness": 0.5}},
        "optimizer": {"name": "optax:scale_by_adam", "schedule": "own_schedules:flat"},
        "model": {"name": "jaxcl.models:StaticEncoder"},
    }
    parts = read_settings(config).parts
    assert parts.loss.function is infonce_loss
    assert parts.optimizer is optax.scale_by_adam
    assert parts.schedule(0.25, warmup_steps=1, steps=2)(7) == 0.25


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("infonc", r"loss\.name='infonc' is unknown \(did you mean 'infonce'\?\)"),
        ("no_such_package:loss", r"loss\.name='no_such_package:loss' cannot be imported"),
        ("jaxcl.losses:no_such_loss", "cannot be imported"),
        ("jaxcl:losses", "is not a function"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        read_settings({"loss": {"name": name}})


def test_nothing_is_imported_of_a_package_that_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "untrusted.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = {"loss": {"name": "untrusted:loss"}, "optimizer": {"name": "untrusted:rule"}}
    parts = read_settings(other, trust=()).parts  # the encoder alone can be opened
    assert parts.loss.function is parts.optimizer is unresolved
    with pytest.raises(PermissionError, match="--trust untrusted"):
        read_settings({"model": {"name": "untrusted:encoder"}}, trust=("jaxcl",))
    assert "untrusted" not in sys.modules
    with pytest.raises(AssertionError, match="imported"):  # shows that it can be read
        read_settings({"model": {"name": "untrusted:encoder"}}, trust=("untrusted",))
    assert read_settings({"model": {"name": "jaxcl.models:StaticEncoder"}}, trust=("jaxcl",))


@pytest.mark.parametrize("name", ["", "a/b", "a b", "validation", "time", "ä"])
def test_a_set_cannot_have_the_name_of_other_metrics(name):
    with pytest.raises(ValueError, match=re.escape(f"evaluation.sets has the name {name!r}")):
        read_settings({"evaluation": {"sets": {name: "sts-dev.csv"}}})
    assert read_settings({"evaluation": {"sets": {"sts_dev-2": "a"}}}).evaluation.sets


def test_patience_needs_a_metric_and_min_delta_needs_patience():
    with pytest.raises(ValueError, match=r"evaluation\.patience=3 counts evaluations of .* None"):
        read_settings({"evaluation": {"patience": 3}})
    evaluation = {"best_metric": "dev/spearman", "patience": 3, "min_delta": 0.01}
    changed = [f"evaluation.{name}" for name in evaluation]
    read_settings({"evaluation": evaluation}, changed=changed)
    del evaluation["patience"]
    with pytest.raises(
        ValueError, match=r"evaluation\.min_delta has no effect here: evaluation\.pat"
    ):
        read_settings({"evaluation": evaluation}, changed=changed)
