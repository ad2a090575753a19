"""A section of a config becomes a NamedTuple, or an error that names the field."""

import math
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
import pytest

from jaxcl.settings.section_reader import read_section
from jaxcl.typing import Range


class Inner(NamedTuple):
    rate: Annotated[float, Range(above=0, most=1)] = 0.5
    names: tuple[str, ...] = ()


class Outer(NamedTuple):
    count: Annotated[int, Range(least=1)] = 3
    inner: Inner = Inner()
    maybe: Annotated[int, Range(least=0)] | None = None
    pairs: tuple[tuple[int | str, Annotated[float, Range(least=0)]], ...] = ()
    sizes: Mapping[str, int] = {}
    on: bool = False


def test_given_values_are_read_and_the_others_have_defaults():
    given = {"count": np.int64(5), "inner": {"rate": 1, "names": ["a"]}, "pairs": [["x", 2]]}
    assert read_section(Outer, given) == Outer(5, Inner(1.0, ("a",)), pairs=(("x", 2.0),))
    assert read_section(Outer, {}) == Outer()
    assert isinstance(read_section(Outer, {"inner": {"rate": 1}}).inner.rate, float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuont": 1}, r"cuont is unknown \(did you mean 'count'\?\); a config has count, inner"),
        ({"inner": {"rat": 1}}, r"inner\.rat is unknown \(did you mean 'rate'\?\)"),
        ({"count": 0}, "count=0; set it to at least 1"),
        ({"count": 1.5}, r"count=1\.5; set it to an integer"),
        ({"count": True}, "count=True; set it to an integer"),
        ({"count": None}, "count=None; set it to an integer"),
        ({"count": "3"}, "count='3'; set it to an integer"),
        ({"inner": {"rate": 0.0}}, r"inner\.rate=0\.0; set it above 0, at most 1"),
        ({"inner": {"rate": math.nan}}, r"inner\.rate=nan; set it above 0, at most 1"),
        ({"inner": {"names": "abc"}}, r"inner\.names='abc'; set it to a tuple"),
        ({"inner": 3}, "inner=3; set it to a ConfigDict with rate, names"),
        ({"maybe": -1}, "maybe=-1; set it to at least 0"),
        ({"pairs": [["x"]]}, r"pairs=\['x'\]; set it to a tuple of 2"),
        ({"pairs": [["x", -1.0]]}, r"pairs=-1\.0; set it to at least 0"),
        ({"sizes": 4}, "sizes=4; set it to a mapping"),
        ({"sizes": {"data": "all"}}, r"sizes\.data='all'; set it to an integer"),
        ({"on": 1}, "on=1; set it to True or False"),
    ],
)
def test_invalid_values_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        read_section(Outer, given)


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(least=0), [0, 1e38], [-1e-9, 1e39, math.inf, math.nan]),
        (Range(above=0), [1e-300], [0, -1.0, math.nan]),
        (Range(least=0, below=1), [0, 0.999], [1, -0.1]),
        (Range(above=0, finite=False), [math.inf], [-math.inf, math.nan]),
        (Range(), [-1e9, 0], [math.inf, -math.inf, math.nan]),
        (Range(finite=False), [math.inf, -math.inf], [math.nan]),
    ],
)
def test_a_range_ends_where_it_says(limits, inside, outside):
    for value in inside:
        limits.check("x", value)
    for value in outside:
        with pytest.raises(ValueError, match="x="):
            limits.check("x", value)
