from math import exp, log

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.losses import sigmoid_pair_loss

pytestmark = pytest.mark.usefixtures("x64")


def test_two_pairs_by_hand():
    queries, keys = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.eye(2)
    # scores at temperature .5 with bias −1: [[1, −1], [.2, .6]]
    loss = sigmoid_pair_loss(queries, keys, temperature=0.5, bias=-1.0)
    wanted = [log(1 + exp(-1)) + log(1 + exp(-1)), log(1 + exp(-0.6)) + log(1 + exp(0.2))]
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
