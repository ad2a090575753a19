"""Training under global settings and contexts of JAX, as a user's program may set them."""

import contextlib
import json

import jax
import pytest

from jaxcl.topics import main as topics
from jaxcl.train import train
from tests.test_train import tiny  # noqa: F401 - a fixture


@contextlib.contextmanager
def everywhere_64_bit_types():
    """As `JAX_ENABLE_X64=1` does, in all threads."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


CONTEXTS = {
    "64-bit types": everywhere_64_bit_types,
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "NaN checks": lambda: jax.debug_nans(True),
    "another mesh": lambda: jax.set_mesh(
        jax.make_mesh(
            (8,), ("others",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()
        )
    ),
}
CHANGES = {
    "steps": 6,
    "run.evaluate_every": 3,
    "assignment.name": "gcbs",
    "assignment.gcbs.refresh_every": 2,
    "assignment.gcbs.picture": False,
    "negatives.bank.kind": "instance",
    "negatives.tiers.stratified": 16,
    "negatives.tiers.nearest": 2,
    "negatives.tiers.mixed": 2,
    "negatives.mined.refresh_every": 3,
    "negatives.momentum_encoder.initial": 0.9,
}


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):  # noqa: F811 - pytest passes the fixture `tiny`
    """The results of the run under JAX's defaults."""
    return train(tiny(**CHANGES), tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_run_trains_and_finds_topics_under(name, tiny, plain, tmp_path, capsys):  # noqa: F811 - pytest passes the fixture `tiny`
    with CONTEXTS[name]():
        results = train(tiny(**CHANGES), tmp_path / "run")
        with contextlib.suppress(SystemExit):
            topics([f"--workdir={tmp_path / 'run'}", "--topics=3"])
    assert "error" not in capsys.readouterr().err
    found, wanted = (
        one["metrics"]["validation"]["plain"]["dense"]["mrr@10"]["mean"] for one in (results, plain)
    )
    assert found == pytest.approx(wanted, abs=0.02 if name == "64-bit types" else 1e-6)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
