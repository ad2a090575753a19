"""Counts, similarities and shares of a query's negatives, against a dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.losses import (
    ExplicitNegatives,
    Masks,
    OwnNegatives,
    SharedNegatives,
    measure_negatives,
)
from jaxcl.ops.mesh import make_mesh
from tests.helpers import unit_vectors

pytestmark = pytest.mark.usefixtures("x64")

ROWS, OWN, SHARED, DIM = 16, 3, 24, 6
TEMPERATURE, MARGIN = 0.3, 0.1


def arguments():
    rng = np.random.default_rng(0)
    return {
        "ids": jnp.arange(ROWS) // 2,
        "negatives": {
            "explicit": ExplicitNegatives(
                unit_vectors(2, ROWS, OWN, DIM),
                ids=jnp.asarray(rng.integers(0, ROWS, (ROWS, OWN))),
                valid=jnp.asarray(rng.random((ROWS, OWN)) < 0.7),
            ),
            "bank": SharedNegatives(
                unit_vectors(3, SHARED, DIM),
                ids=jnp.asarray(rng.integers(0, 8, SHARED)),
                valid=jnp.asarray(rng.random(SHARED) < 0.8),
            ),
            "mixed": OwnNegatives(
                unit_vectors(4, ROWS, OWN, DIM), valid=jnp.asarray(rng.random((ROWS, OWN)) < 0.9)
            ),
        },
    }


def dense(queries, keys, given):
    """(similarity, present, counted) of each kind, `[q, any]`."""
    ids = np.asarray(given["ids"])
    explicit, bank, mixed = given["negatives"].values()
    own = np.einsum("qd,qnd->qn", queries, mixed.vectors)
    return {
        "batch": (queries @ keys.T, ~np.eye(ROWS, dtype=bool), ids[:, None] != ids),
        "explicit": (
            queries @ np.asarray(explicit.vectors).reshape(-1, DIM).T,
            np.broadcast_to(np.asarray(explicit.valid).ravel(), (ROWS, ROWS * OWN)),
            ids[:, None] != np.asarray(explicit.ids).ravel(),
        ),
        "bank": (
            queries @ np.asarray(bank.vectors).T,
            np.broadcast_to(np.asarray(bank.valid), (ROWS, SHARED)),
            ids[:, None] != np.asarray(bank.ids),
        ),
        "mixed": (own, np.asarray(mixed.valid), np.ones(own.shape, bool)),
    }


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_the_metrics_agree_with_a_dense_matrix(devices, implementation):
    sides = [np.asarray(unit_vectors(seed, ROWS, DIM)) for seed in range(2)]
    given = arguments()
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    rows = PartitionSpec("data")

    def local(sides, given):
        return measure_negatives(
            *sides,
            temperature=TEMPERATURE,
            masks=Masks(ids=given["ids"], margin=MARGIN),
            negatives=given["negatives"],
            axis_name="data",
            implementation=implementation,
        )

    measure = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    found = jax.jit(measure)(tuple(map(jnp.asarray, sides)), given)
    queries, keys = sides
    positives = (queries * keys).sum(1)
    ceilings = positives - MARGIN
    kinds = dense(queries, keys, given)
    # In the batch, the key's row also masks: its ceiling applies in the other direction.
    total = np.exp(positives / TEMPERATURE)
    masses = {}
    for kind, (similarity, present, different) in kinds.items():
        counted = present & different & (similarity <= ceilings[:, None])
        masses[kind] = np.where(counted, np.exp(similarity / TEMPERATURE), 0).sum(1)
        total = total + masses[kind]
        metrics = found[kind]
        np.testing.assert_allclose(metrics.counted, counted.sum(1))
        np.testing.assert_allclose(metrics.masked, present.sum(1) - counted.sum(1))
        mean = np.where(counted, similarity, 0).sum(1) / np.maximum(counted.sum(1), 1)
        np.testing.assert_allclose(metrics.similarity, mean, atol=1e-12)
        assert 0 < counted.sum() < present.sum() or kind == "mixed"
    for kind, mass in masses.items():
        np.testing.assert_allclose(found[kind].share, mass / total, rtol=1e-10)
