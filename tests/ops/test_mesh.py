"""Meshes: every shape that fits the devices, and errors that say what would."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxcl.ops.mesh import batch_sharding, make_mesh, put_batch, replicated_sharding


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"data": -1}, {"data": 8}),
        ({"data": 8}, {"data": 8}),
        ({"data": 2, "model": 4}, {"data": 2, "model": 4}),
        ({"data": -1, "model": 4}, {"data": 2, "model": 4}),
        ({"data": 8, "model": -1}, {"data": 8, "model": 1}),
        ({"a": 2, "b": 2, "c": 2}, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_axes_keep_their_order_and_one_size_may_be_inferred(axes, shape):
    mesh = make_mesh(axes)
    assert list(mesh.shape.items()) == list(shape.items())
    assert mesh.axis_types == (AxisType.Auto,) * len(shape)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_can_take_some_of_the_devices():
    some = jax.devices()[2:5]
    mesh = make_mesh({"data": -1}, devices=some)
    assert list(mesh.devices.flat) == some


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"data": 16}, {"data": 2, "model": 2}, {"data": -1, "model": 3}]
)
def test_sizes_that_do_not_fit_the_devices_are_an_error_with_a_remedy(axes):
    with pytest.raises(ValueError, match="does not fit") as error:
        make_mesh(axes)
    assert str(error.value) == (
        f"mesh={axes} does not fit 8 devices; the product of its sizes must be 8 "
        "(one may be -1 for all remaining devices)"
    )


@pytest.mark.parametrize("axes", [{}, {"a": -1, "b": -1}, {"a": 0}, {"a": -2}, {"a": 8, "b": 0}])
def test_invalid_sizes_are_an_error(axes):
    with pytest.raises(ValueError, match="is not a mesh") as error:
        make_mesh(axes)
    assert str(error.value) == (
        f"mesh={axes} is not a mesh; give axis sizes of at least 1 (one may be -1)"
    )


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "model": 4}])
def test_batches_are_spread_over_all_axes_and_copies_are_whole(axes):
    mesh = make_mesh(axes)
    assert batch_sharding(mesh).shard_shape((16, 3)) == (16 // 8, 3)
    assert replicated_sharding(mesh).shard_shape((16, 3)) == (16, 3)
    assert replicated_sharding(mesh).spec == PartitionSpec()


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "model": 4}])
def test_a_batch_round_trips_through_the_devices(axes):
    mesh = make_mesh(axes)
    batch = {
        "query": {"tokens": np.arange(48, dtype=np.int32).reshape(16, 3)},
        "row": np.arange(16, dtype=np.int32),
    }
    found = put_batch(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), batch)
    for array in jax.tree.leaves(found):
        assert array.sharding == batch_sharding(mesh)
        assert array.dtype == np.int32
    for shard in found["row"].addressable_shards:
        np.testing.assert_array_equal(shard.data, batch["row"][shard.index])


def test_rows_that_do_not_divide_over_the_devices_are_an_error():
    with pytest.raises(ValueError, match="evenly divide"):
        put_batch({"row": np.arange(12)}, make_mesh({"data": -1}))
