"""The loss and its kernels compile for a TPU pod, without one, and fit its chips."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -e '.[tpu]'",
)

_PRELUDE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxcl.losses import Masks, infonce_loss, sigmoid_pair_loss, supervised_infonce_loss

topology, exchange, *_ = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices).reshape(-1), ("data",))
rows, whole = PartitionSpec("data"), PartitionSpec()

def argument(shape, dtype, spec=rows):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

scalar = argument((), jnp.float32, whole)
"""

_MILLION = """
def local(queries, keys, temperature):
    how = {"exchange": exchange, "implementation": sys.argv[3], "axis_name": "data"}
    return infonce_loss(queries, keys, temperature=temperature, **how)

loss = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows)
side = argument((2**20, 256), jnp.float32)
gradient = jax.jit(jax.value_and_grad(lambda *inputs: loss(*inputs).mean(), (0, 1, 2)))
memory = gradient.lower(side, side, scalar).compile().memory_analysis()
print(json.dumps(memory.temp_size_in_bytes / 2**20))
"""

_KERNELS = """
rows_of_device, features, dtype = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
size = rows_of_device * len(devices)
labels = {
    "ids": argument((size,), jnp.int32),
    "groups": argument((size, 2), jnp.int32),
    "valid": argument((size,), jnp.bool_),
    "guides": tuple(argument((size, 64), jnp.float32) for _ in range(2)),
}

def local(queries, keys, temperature, labels):
    how = {"exchange": exchange, "implementation": "pallas_tpu", "axis_name": "data"}
    how |= {"temperature": temperature}
    valid = Masks(valid=labels["valid"])
    masks = valid._replace(ids=labels["ids"], groups=labels["ids"], guides=labels["guides"])
    masks = masks._replace(margin=0.1)
    return (
        infonce_loss(queries, keys, **how, hardness=1.0, masks=masks)
        + sigmoid_pair_loss(queries, keys, **how, masks=valid)
        + supervised_infonce_loss(queries, keys, **how, labels=labels["groups"], masks=valid)
    )

loss = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, whole, rows), out_specs=rows)
side = argument((size, features), dtype)
gradient = jax.jit(jax.value_and_grad(lambda *inputs: loss(*inputs).mean(), (0, 1, 2)))
text = gradient.lower(side, side, scalar, labels).compile().as_text()
print(json.dumps(text.count("tpu_custom_call")))
"""


def answer(program: str, *arguments: object) -> float:
    finished = subprocess.run(
        [sys.executable, "-c", _PRELUDE + program, *map(str, arguments)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2_000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("implementation", ["tiled", "pallas_tpu"])
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4"])
def test_a_million_pairs_take_little_of_a_chip_in_a_ring(topology, implementation):
    assert answer(_MILLION, topology, "ring", implementation) < 1_024


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize(
    ("topology", "rows_of_device", "features", "dtype"),
    [
        ("v5e:4x4", 1_024, 256, "bfloat16"),
        ("v5p:2x2x2", 1_024, 1_024, "float32"),
        ("v5e:4x4", 801, 100, "float32"),  # sizes that no tile divides
        ("v5p:2x2x2", 40, 768, "bfloat16"),  # less than a tile
    ],
)
def test_the_kernels_compile_with_every_mask_and_reduction(
    topology, rows_of_device, features, dtype, exchange
):
    kernels = answer(_KERNELS, topology, exchange, rows_of_device, features, dtype)
    assert kernels >= 3 * 3  # three losses, forward and twice backward


_ORDER = """
from jaxcl.assignment import Gcbs
from jaxcl.assignment.order_program import make_device_order
from jaxcl.assignment.sizes import sizes_of

num_rows = int(sys.argv[3])
side = argument((num_rows, 256), jnp.float32)
key = argument((), jax.eval_shape(lambda: jax.random.key(0)).dtype, whole)
settings = Gcbs(graph="clustered")
order = make_device_order(mesh, capacity=num_rows, settings=settings)
sizes = sizes_of(num_rows, block_size=64, batch_size=64, settings=settings)
sizes = jax.tree.map(lambda leaf: argument(leaf.shape, leaf.dtype, whole), sizes)
memory = order.lower(side, side, scalar, key, (), sizes).compile().memory_analysis()
print(json.dumps(memory.temp_size_in_bytes / 2**20))
"""


@pytest.mark.slow  # the compiler takes four minutes
def test_the_order_of_a_million_rows_takes_little_of_a_chip():
    """The embeddings of a chip take 8 MiB, and all row numbers 4 MiB."""
    assert answer(_ORDER, "v5e:16x16", "", 2**20) < 128


_PLAN = """
from jaxcl.configs import large_encoders
from jaxcl.cost.chips import CHIPS
from jaxcl.plan import make_plan
from jaxcl.settings.read import read_settings

plan = make_plan(read_settings(large_encoders.get_config(exchange)), devices, num_rows=10_000_000)
print(json.dumps(plan.total / CHIPS[topology.partition(":")[0]].memory))
"""


@pytest.mark.slow  # the compiler takes one minute, and four
@pytest.mark.parametrize("variant", ["bert_base", "mistral_7b"])
def test_the_step_of_a_large_encoder_fits_a_chip(variant):
    assert 0.05 < answer(_PLAN, "v5e:16x16", variant) < 0.9
