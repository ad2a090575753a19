"""Losses of two views, against plain implementations of the equations that they cite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import infonce_loss, nt_xent_loss, supervised_infonce_loss
from jaxcl.losses.comparison import DIRECTIONS
from jaxcl.ops.mesh import make_mesh
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

ROWS, TEMPERATURE = 16, 0.2
LABELS = jnp.array([0, 3, 1, 0, 2, 3, 3, 4, 5, 1, 0, 6, 7, 7, 2, 9])


def nt_xent_by_equation(views, temperature):
    """Chen et al. 2020, equation 1: the mean of l(i, j) over both members of all pairs.

    `views` are the 2N views; i and i + N are a pair.
    """
    count = len(views)
    similar = views @ views.T / temperature
    total = 0.0
    for i in range(count):
        j = (i + count // 2) % count
        others = [k for k in range(count) if k != i]
        total -= similar[i, j] - np.log(np.exp(similar[i, others]).sum())
    return total / count


def supervised_by_equation(views, labels, temperature):
    """Khosla et al. 2020, equation 2: L_out, divided by the number of views."""
    count = len(views)
    similar = views @ views.T / temperature
    total = 0.0
    for i in range(count):
        others = [a for a in range(count) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        log_sum = np.log(np.exp(similar[i, others]).sum())
        total += -sum(similar[i, p] - log_sum for p in positives) / len(positives)
    return total / count


def nt_xent(queries, keys, labels, **how):
    return nt_xent_loss(queries, keys, temperature=TEMPERATURE, **how)


def supervised(queries, keys, labels, **how):
    return supervised_infonce_loss(
        queries, keys, labels=labels, temperature=TEMPERATURE, directions=DIRECTIONS, **how
    )


def mean_over(loss, devices, **how):
    """The mean loss of all rows as a function of both sides, on some devices."""
    if devices == 1:
        return lambda queries, keys: loss(queries, keys, LABELS, **how).mean()
    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        functools.partial(loss, axis_name="data", **how),
        mesh=make_mesh({"data": devices}),
        in_specs=(rows, rows, rows),
        out_specs=rows,
    )
    return lambda queries, keys: sharded(queries, keys, LABELS).mean()


@pytest.mark.parametrize(
    ("devices", "how"),
    [(1, {}), (1, {"implementation": "tiled"}), (8, {}), (8, {"exchange": "ring"})],
    ids=str,
)
@pytest.mark.parametrize("name", ["nt_xent", "supervised"])
def test_two_views_are_the_cited_equation(name, devices, how):
    if how.get("exchange") == "ring":
        how = {**how, "implementation": "tiled"}
    sides = unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    views = np.concatenate([np.asarray(side) for side in sides])
    labels = np.concatenate([LABELS, LABELS])
    loss, wanted = {
        "nt_xent": (nt_xent, nt_xent_by_equation(views, TEMPERATURE)),
        "supervised": (supervised, supervised_by_equation(views, labels, TEMPERATURE)),
    }[name]
    found, gradients = jax.jit(jax.value_and_grad(mean_over(loss, devices, **how), (0, 1)))(*sides)
    assert relative_error(found, wanted) < 1e-12
    on_one = jax.grad(mean_over(loss, 1), (0, 1))(*sides)
    assert max(relative_errors(gradients, on_one).values()) < 1e-10


def test_classes_of_one_row_are_nt_xent():
    sides = unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    found = supervised(*sides, jnp.arange(ROWS))
    np.testing.assert_allclose(found, nt_xent(*sides, None), rtol=1e-12)


def test_one_softmax_of_everything_is_another_loss():
    sides = unit_vectors(0, ROWS, 8), unit_vectors(1, ROWS, 8)
    joint = infonce_loss(*sides, temperature=TEMPERATURE, directions=DIRECTIONS, partition="joint")
    assert relative_error(joint, nt_xent(*sides, None)) > 0.05
