"""The library under JAX's global settings, and inside another program's mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.every_function import EVERY
from tests.helpers import unit_vectors

pytestmark = pytest.mark.usefixtures("unchecked_annotations")

ROWS = 6


@contextlib.contextmanager
def mesh_of_another_program(kind):
    mesh = jax.make_mesh((6,), ("data",), devices=jax.devices()[:6], axis_types=(kind,))
    with jax.set_mesh(mesh):
        yield


SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "explicit mesh": lambda: mesh_of_another_program(AxisType.Explicit),
    "auto mesh": lambda: mesh_of_another_program(AxisType.Auto),
}


# All others are slow tests, since each operation is recompiled under each setting.
QUICK = ("infonce with labels", "nearest", "instances")


@pytest.mark.parametrize(
    "setting",
    [pytest.param(one, marks=[pytest.mark.slow] if one == "auto mesh" else []) for one in SETTINGS],
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in EVERY],
)
def test_every_function_gives_the_same_under_each_setting(name, setting):
    sides = [unit_vectors(seed, ROWS, 8, dtype=jnp.float32) for seed in (0, 1)]
    with SETTINGS[setting]():  # first, since otherwise a compiled program would be used
        found = EVERY[name](*sides)
    expected = EVERY[name](*sides)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.shape(ours) == np.shape(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
