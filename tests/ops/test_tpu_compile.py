"""The loss compiles for a pod that is not there, and fits its chips."""

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

_PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxcl.losses import infonce_loss

topology, exchange = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices).reshape(-1), ("data",))
rows, whole = PartitionSpec("data"), PartitionSpec()

def local(queries, keys, temperature):
    how = {"exchange": exchange, "implementation": "tiled", "axis_name": "data"}
    return infonce_loss(queries, keys, temperature=temperature, **how)

loss = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows)
side = jax.ShapeDtypeStruct((2**20, 256), jnp.float32, sharding=NamedSharding(mesh, rows))
scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, whole))
gradient = jax.jit(jax.value_and_grad(lambda *inputs: loss(*inputs).mean(), (0, 1, 2)))
memory = gradient.lower(side, side, scalar).compile().memory_analysis()
print(json.dumps(memory.temp_size_in_bytes / 2**20))
"""


def temporary_mebibytes(topology: str, exchange: str) -> float:
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, topology, exchange],
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


@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:4x4x4"])
def test_a_million_pairs_take_little_of_a_chip_in_a_ring(topology):
    assert temporary_mebibytes(topology, "ring") < 1_024
