"""The losses of image configs against plain float64 restatements, through the encoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import LOSSES
from jaxcl.models import ConvNetEncoder, StaticEncoder, TowerSpec, make_towers
from jaxcl.ops.mesh import make_mesh
from jaxcl.step.batch_loss import make_loss
from tests.helpers import relative_error, relative_errors

pytestmark = pytest.mark.usefixtures("x64")

ROWS, TEMPERATURE, BIAS = 8, 0.1, -2.0

convnet = functools.partial(
    ConvNetEncoder, 6, dim=5, widths=(4,), hidden_dim=7, head=(6,), compute_dtype="float64"
)


def nt_xent(views, others):
    """Chen et al., 2020, equation 1: each of the 2N views finds its partner among the others."""
    vectors = jnp.concatenate([views, others])
    scores = jnp.exp(vectors @ vectors.T / TEMPERATURE)
    total, count = 0.0, 2 * ROWS
    for row in range(count):
        partner = (row + ROWS) % count
        rest = sum(scores[row, other] for other in range(count) if other != row)
        total -= jnp.log(scores[row, partner] / rest)
    return total / count


def siglip(images, texts):
    """Zhai et al., 2023, equation 2: a sigmoid for each pair, with the sign of its label."""
    total = 0.0
    for row in range(ROWS):
        for other in range(ROWS):
            label = 1 if row == other else -1
            logit = images[row] @ texts[other] / TEMPERATURE + BIAS
            total -= jnp.log(1 / (1 + jnp.exp(-label * logit)))
    return total / ROWS


def two_views():
    towers = make_towers(lambda rngs: convnet(rngs=rngs))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, ROWS, 6, 6, 3)))
    return towers, {"query": {"image": images[0]}, "key": {"image": images[1]}}


def images_and_texts():
    towers = make_towers(
        {
            "query": TowerSpec(lambda rngs: convnet(rngs=rngs)),
            "key": TowerSpec(lambda rngs: StaticEncoder(20, dim=5, max_tokens=4, rngs=rngs)),
        }
    )
    _, batch = two_views()
    tokens = np.random.default_rng(1).integers(1, 20, (ROWS, 4))
    return towers, batch | {"key": {"tokens": jnp.asarray(tokens)}}


CASES = {"nt_xent": (two_views, nt_xent), "sigmoid": (images_and_texts, siglip)}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_images_and_its_gradients_equal_the_paper_s(name, devices):
    make, restatement = CASES[name]
    towers, batch = make()
    params = {"towers": towers.init(jax.random.key(0)), "log_temperature": jnp.log(TEMPERATURE)}
    params |= {"bias": jnp.asarray(BIAS)} if name == "sigmoid" else {}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    mesh = make_mesh({"data": devices}, devices=jax.devices()[:devices])
    batch |= {"row": jnp.arange(ROWS, dtype=jnp.int32)}
    loss = make_loss(towers, LOSSES[name], mesh, masks={"ids": "row"})

    def plain(towers_params):
        return restatement(
            *(towers.encode(towers_params, side, batch[side]) for side in ("query", "key"))
        )

    (found, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, {}, batch, None)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(plain))(params["towers"])
    assert relative_error(found, wanted) < 1e-12
    errors = relative_errors(gradients["towers"], wanted_gradients)
    assert max(errors.values()) < 1e-10, errors
