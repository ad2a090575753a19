from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import Masks, infonce_loss, supervised_infonce_loss
from jaxcl.ops.mesh import make_mesh
from tests.helpers import relative_errors, unit_vectors

pytestmark = pytest.mark.usefixtures("x64")


def test_three_rows_in_two_groups_by_hand():
    queries, keys = (
        jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]),
        jnp.eye(2)[jnp.array([0, 1, 1])],
    )
    # scores at temperature 1: [[1, 0, 0], [.6, .8, .8], [0, 1, 1]]; rows 0 and 1 are one group
    loss = supervised_infonce_loss(
        queries, keys, labels=jnp.array([5, 5, 9]), temperature=1.0, directions=("query_to_key",)
    )
    wanted = [
        log(exp(1) + exp(0) + exp(0)) - (1 + 0) / 2,
        log(exp(0.6) + exp(0.8) + exp(0.8)) - (0.6 + 0.8) / 2,
        log(exp(0) + exp(1) + exp(1)) - 1,
    ]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_groups_of_one_are_infonce():
    queries, keys = unit_vectors(0, 7, 4), unit_vectors(1, 7, 4)
    loss = supervised_infonce_loss(queries, keys, labels=jnp.arange(7), temperature=0.1)
    np.testing.assert_allclose(loss, infonce_loss(queries, keys, temperature=0.1), rtol=1e-12)


def test_many_keys_belong_to_many_queries():
    queries, keys = unit_vectors(0, 3, 4), unit_vectors(1, 3, 4)
    positives = jnp.array([[10, 12], [11, -1], [10, 11]])  # row numbers of each query's keys
    loss = supervised_infonce_loss(
        queries,
        keys,
        labels=positives,
        key_labels=jnp.array([10, 11, 12]),
        temperature=1.0,
        directions=("query_to_key",),
    )
    scores = np.asarray(queries @ keys.T)
    everything = np.log(np.exp(scores).sum(1))
    wanted = everything - [scores[0, [0, 2]].mean(), scores[1, 1], scores[2, [0, 1]].mean()]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    back = supervised_infonce_loss(
        queries,
        keys,
        labels=positives,
        key_labels=jnp.array([10, 11, 13]),
        temperature=1.0,
        directions=("key_to_query",),
    )
    everything = np.log(np.exp(scores).sum(0))
    np.testing.assert_allclose(
        back,
        [everything[0] - scores[[0, 2], 0].mean(), everything[1] - scores[[1, 2], 1].mean(), 0],
        rtol=1e-12,
    )


def test_padding_has_no_effect():
    queries, keys = unit_vectors(0, 7, 4), unit_vectors(1, 7, 4)
    groups, valid = jnp.array([0, 0, 1, 1, 2, 0, 1]), jnp.arange(7) < 5
    loss = supervised_infonce_loss(queries, keys, labels=groups, masks=Masks(valid=valid))
    wanted = supervised_infonce_loss(queries[:5], keys[:5], labels=groups[:5])
    np.testing.assert_allclose(loss[:5], wanted, rtol=1e-12)
    assert loss[5:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("exchange", "implementation"),
    [("gather", "reference"), ("gather", "tiled"), ("ring", "tiled")],
)
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(exchange, implementation):
    mesh = make_mesh({"replica": 2, "data": 4})
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    groups = jnp.arange(16) % 5

    def local(queries, keys, groups, temperature):
        return supervised_infonce_loss(
            queries,
            keys,
            labels=groups,
            temperature=temperature,
            axis_name=mesh.axis_names,
            exchange=exchange,
            implementation=implementation,
        )

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, whole), out_specs=rows)

    def over_mesh(queries, keys, temperature):
        return sharded(queries, keys, groups, temperature).mean()

    def dense(queries, keys, temperature):
        return supervised_infonce_loss(queries, keys, labels=groups, temperature=temperature).mean()

    inputs = unit_vectors(0, 16, 8), unit_vectors(1, 16, 8), jnp.asarray(0.1)
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*inputs) for f in (over_mesh, dense))
    assert max(relative_errors(found, wanted).values()) < 1e-10


def test_arguments_without_a_meaning_here_are_errors():
    sides, labels = (jnp.eye(3), jnp.eye(3)), jnp.array([0, 0, 1])
    within = {"directions": ("query_to_key", "query_to_query")}
    for options, message in (
        ({"masks": Masks(groups=labels)}, "masks may only have ids and valid"),
        ({"masks": Masks(margin=0.1)}, "masks may only have ids and valid"),
        ({**within, "key_labels": labels}, "set key_labels to None"),
        ({**within, "temperature": jnp.ones(3)}, "one temperature for all rows"),
    ):
        with pytest.raises(ValueError, match=message):
            supervised_infonce_loss(*sides, labels=labels, **options)
    with pytest.raises(ValueError, match="one temperature for all rows"):
        infonce_loss(*sides, temperature=jnp.ones(3), partition="anchor")
