from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import Masks, decoupled_infonce_loss, running_estimate_loss
from jaxcl.losses.running_estimate import (
    NEVER_SEEN,
    estimate_memory,
    remembered_estimate_loss,
)
from jaxcl.ops.mesh import make_mesh
from tests.helpers import relative_error, relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

QUERIES = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
KEYS = np.eye(2)[[0, 1, 1]]
# At temperature 1: queries with keys [[1, 0, 0], [.6, .8, .8], [0, 1, 1]].
ONE_WAY = {"directions": ("query_to_key",), "temperature": 1.0}


def unseen():
    return jnp.full((3, 1), NEVER_SEEN)


def means():
    """g of each row: the mean over its negatives of exp(difference of scores)."""
    return [
        (exp(0 - 1) + exp(0 - 1)) / 2,
        (exp(0.6 - 0.8) + exp(0.8 - 0.8)) / 2,
        (exp(0 - 1) + exp(1 - 1)) / 2,
    ]


def test_the_first_estimate_is_the_batch_s_and_later_ones_are_mixed():
    sides = jnp.asarray(QUERIES), jnp.asarray(KEYS)
    loss, estimates = running_estimate_loss(*sides, estimates=unseen(), **ONE_WAY)
    np.testing.assert_allclose(estimates[:, 0], np.log(means()), rtol=1e-12)
    np.testing.assert_allclose(loss, np.log(means()), rtol=1e-10)  # up to epsilon
    before = jnp.log(jnp.array([[2.0], [0.5], [0.25]]))
    loss, estimates = running_estimate_loss(*sides, estimates=before, update_rate=0.3, **ONE_WAY)
    wanted = np.log(0.7 * np.array([2, 0.5, 0.25]) + 0.3 * np.array(means()))
    np.testing.assert_allclose(estimates[:, 0], wanted, rtol=1e-12)
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)


def test_the_gradient_is_that_of_the_batch_over_the_estimate():
    sides = unit_vectors(0, 5, 4), unit_vectors(1, 5, 4)
    before = jnp.log(jnp.linspace(0.5, 2.0, 5))[:, None]

    def loss(queries, keys):
        options = {"estimates": before, "update_rate": 0.4, "epsilon": 1e-3}
        return running_estimate_loss(
            queries, keys, **options, directions=("query_to_key",), temperature=0.5
        )[0].sum()

    def by_hand(queries, keys):
        scores = queries @ keys.T / 0.5
        ratios = jnp.exp(scores - jnp.diag(scores)[:, None]) * (1 - jnp.eye(5))
        mean = ratios.sum(1) / 4
        fixed = jax.lax.stop_gradient(0.6 * jnp.exp(before[:, 0]) + 0.4 * mean)
        return (mean / (1e-3 + fixed)).sum()

    found, wanted = (jax.grad(function, (0, 1))(*sides) for function in (loss, by_hand))
    assert max(relative_errors(found, wanted).values()) < 1e-12


@pytest.mark.slow
def test_an_update_rate_of_1_gives_the_decoupled_loss_less_log_n():
    sides = unit_vectors(0, 6, 4), unit_vectors(1, 6, 4)
    options = {"estimates": jnp.ones((6, 2)), "update_rate": 1.0, "epsilon": 1e-300}
    found, wanted = (
        jax.value_and_grad(lambda *sides, f=f: f(*sides).sum(), (0, 1))(*sides)
        for f in (
            lambda *sides: running_estimate_loss(*sides, temperature=0.1, **options)[0],
            lambda *sides: decoupled_infonce_loss(*sides, temperature=0.1) - log(5),
        )
    )
    assert max(relative_errors(found, wanted).values()) < 1e-12


def test_robustness_adds_a_gradient_of_the_temperature():
    sides = jnp.asarray(QUERIES), jnp.asarray(KEYS)
    one_way = {"directions": ("query_to_key",), "estimates": unseen(), "update_rate": 1.0}

    def loss(temperature):
        return running_estimate_loss(*sides, temperature=temperature, robustness=2.0, **one_way)[
            0
        ].sum()

    def by_hand(temperature):
        scores = sides[0] @ sides[1].T / temperature
        ratios = jnp.exp(scores - jnp.diag(scores)[:, None]) * (1 - jnp.eye(3))
        return (temperature * (jnp.log(ratios.sum(1) / 2) + 2.0)).sum()

    found, wanted = (jax.value_and_grad(f)(0.7) for f in (loss, by_hand))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_each_row_and_direction_may_have_a_temperature():
    sides = unit_vectors(0, 5, 4), unit_vectors(1, 5, 4)
    own = jnp.linspace(0.2, 0.6, 10).reshape(5, 2)
    unseen = jnp.full((5, 2), NEVER_SEEN)
    loss, estimates = running_estimate_loss(*sides, temperature=own, estimates=unseen)
    scores = sides[0] @ sides[1].T
    for column, (matrix, diagonal) in enumerate(((scores, scores), (scores.T, scores.T))):
        ratios = jnp.exp((matrix - jnp.diag(diagonal)[:, None]) / own[:, column, None]) * (
            1 - jnp.eye(5)
        )
        np.testing.assert_allclose(estimates[:, column], jnp.log(ratios.sum(1) / 4), rtol=1e-12)
    np.testing.assert_allclose(loss, estimates.mean(1), rtol=1e-8)


def test_masked_rows_keep_their_estimate():
    sides = unit_vectors(0, 4, 4), unit_vectors(1, 4, 4)
    before = jnp.array([[0.1, 0.2], [0.3, 0.4], [NEVER_SEEN] * 2, [0.7, 0.8]])
    loss, estimates = running_estimate_loss(
        *sides, estimates=before, masks=Masks(valid=jnp.array([True, True, False, False]))
    )
    assert loss[2:].tolist() == [0, 0]
    np.testing.assert_array_equal(estimates[2:], before[2:])
    assert relative_error(estimates[:2], before[:2]) > 0.1
    alone, kept = running_estimate_loss(sides[0][:1], sides[1][:1], estimates=before[2:3])
    assert (alone.tolist(), kept.tolist()) == ([0.0], [[NEVER_SEEN] * 2])
    nothing = Masks(valid=jnp.zeros(4, bool))
    _, gradient = jax.value_and_grad(
        lambda s: running_estimate_loss(s, s, estimates=before, masks=nothing)[0].sum()
    )(sides[0])
    assert not gradient.any()


@pytest.mark.parametrize(
    ("by_row", "exchange", "implementation"),
    [(False, "ring", "tiled"), (True, "gather", "reference")],
)
def test_any_mesh_gives_loss_estimates_and_gradients_of_one_device(
    by_row, exchange, implementation
):
    mesh = make_mesh({"replica": 2, "data": 4})
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    memory = {"estimates": jnp.linspace(-1.0, 1.0, 32).reshape(16, 2)}
    rate = None
    if by_row:
        memory["log_temperatures"] = jnp.log(jnp.linspace(0.1, 0.3, 32)).reshape(16, 2)
        rate = 0.01

    def local(queries, keys, memory, temperature, axis_name=None):
        return remembered_estimate_loss(
            queries,
            keys,
            memory=memory,
            temperature=temperature,
            temperature_rate=rate,
            robustness=5.0,
            axis_name=axis_name,
            exchange=exchange,
            implementation=implementation,
        )

    sharded = jax.shard_map(
        lambda *inputs: local(*inputs, axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, rows, whole),
        out_specs=rows,
    )

    def run(function):
        def total(queries, keys, temperature):
            loss, updated = function(queries, keys, memory, temperature)
            return loss.mean(), updated

        inputs = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8), jnp.asarray(0.2)
        argnums = (0, 1) if by_row else (0, 1, 2)
        return jax.jit(jax.value_and_grad(total, argnums, has_aux=True))(*inputs)

    found, wanted = run(sharded), run(local)
    assert max(relative_errors(found, wanted).values()) < 1e-10
    moved = {name: relative_error(found[0][1][name], memory[name]) for name in memory}
    assert min(moved.values()) > 1e-3, moved


@pytest.mark.parametrize(
    "direction", ["query_to_key", "key_to_query", "query_to_query", "key_to_key"]
)
def test_equal_temperatures_by_row_are_one_temperature_with_a_guide(direction):
    """The guides of the two sides differ, so they must be swapped with the sides."""
    sides = unit_vectors(0, 6, 4), unit_vectors(1, 6, 4)
    guides = unit_vectors(2, 6, 3), unit_vectors(3, 6, 3)
    options = {"directions": (direction,), "estimates": jnp.full((6, 1), NEVER_SEEN)}

    def loss(temperature, masks):
        return running_estimate_loss(*sides, temperature=temperature, masks=masks, **options)[0]

    masks = Masks(guides=guides, margin=0.1)
    by_row = loss(jnp.full((6, 1), 0.2), masks)
    assert relative_error(by_row, loss(0.2, masks)) < 1e-10
    assert relative_error(by_row, loss(0.2, Masks())) > 1e-3  # the guide masks pairs


def test_a_row_s_own_temperature_goes_down_its_slope_and_stays_in_its_bounds():
    sides = unit_vectors(0, 5, 4), unit_vectors(1, 5, 4)
    options = {"temperature": 0.3, "temperature_rate": 0.01}
    memory = jax.tree.map(lambda table: table[:5], estimate_memory(5, **options))
    how = {"memory": memory, "robustness": 3.0, "temperature_rate": 0.01}

    def loss(log_temperatures):
        return running_estimate_loss(
            *sides,
            estimates=memory["estimates"],
            temperature=jnp.exp(log_temperatures),
            robustness=3.0,
        )[0].sum()

    _, updated = remembered_estimate_loss(*sides, **how)
    slope = jax.grad(loss)(memory["log_temperatures"])
    wanted = memory["log_temperatures"] - 0.01 * slope
    np.testing.assert_allclose(updated["log_temperatures"], wanted, rtol=1e-7)
    assert relative_error(wanted, memory["log_temperatures"]) > 1e-4
    _, clamped = remembered_estimate_loss(*sides, **how, temperature_bounds=(0.4, 0.5))
    np.testing.assert_allclose(clamped["log_temperatures"], log(0.4), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimates": jnp.zeros((3, 1))},
            r"estimates has the shape \(3, 1\), not \(3, 2\)",
        ),
        ({"temperature": jnp.ones(3)}, "temperature"),
        ({"update_rate": 0.0}, "set it above 0, at most 1"),
        ({"epsilon": 0.0}, "epsilon=0.0; set it above 0"),
    ],
)
def test_a_mistake_is_named(options, message):
    sides = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)
    arguments = {"estimates": jnp.zeros((3, 2))} | options
    with pytest.raises(Exception, match=message):
        running_estimate_loss(*sides, **arguments)
