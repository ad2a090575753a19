"""Training on texts with lengths in their inputs, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcl.configs.base import get_config

from jaxcl.check_grad import compare_gradients
from jaxcl.run.metric_writer import read_metrics
from jaxcl.run.training import build_towers
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.prepared_data import prepare_pairs

SMALL = {
    "model.dim": 16,
    "data.vocabulary_size": 100,
    "data.max_tokens.query": 6,
    "data.max_tokens.key": 8,
    "global_batch_size": 8,
    "optimizer.warmup_steps": 2,
    "evaluation.methods": ("dense",),
}
MINED = {
    "negatives.bank.kind": "instance",
    "negatives.mined.refresh_every": 2,
    "negatives.mined.per_query": 2,
    "negatives.mined.rank_range": (1, 5),
    "augmentation.name": "token_dropout",
    "grad_cache.chunk_tokens": 16,
}


def small(**changes):
    config = get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left_behind")
def test_lengths_and_the_padding_id_give_the_same_run(tmp_path):
    """With mined negatives, gradient caching and token dropout."""
    pairs = prepare_pairs(tmp_path)
    config = small(steps=4, **MINED)
    config.data.update(name=str(pairs), splits={"train": "train", "validation": "dev"})
    config.run.update(data_dir=str(tmp_path / "data"), log_every=1)
    by_id = train(config, tmp_path / "by_id")
    config.data.update(special_tokens=False, tokenizer=str(tmp_path / "by_id/tokenizer.json"))
    by_length = train(config, tmp_path / "by_length")
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record]
        for name in ("by_id", "by_length")
    ]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert by_length == by_id


def test_gradients_of_texts_with_prompts_and_lengths_agree_with_one_device():
    settings = read_settings(
        small(
            **{
                "data.special_tokens": True,
                "data.prompts.query": "query: ",
                "data.exclude_prompt": True,
                "data.negatives": "some.npz",
                "grad_cache.chunk_tokens": 16,
            }
        )
    )
    comparisons = compare_gradients(settings)
    assert all(comparison.agrees for comparison in comparisons), comparisons


@pytest.mark.parametrize(
    ("special_tokens", "options", "ends"),
    [(True, {}, 1), (True, {"keep_first": 0, "keep_last": 0}, 0), (False, {}, 0), (None, {}, 0)],
)
def test_augmentations_keep_the_special_tokens_of_a_pretrained_tokenizer(
    special_tokens, options, ends
):
    changes = {f"augmentation.options.{name}": value for name, value in options.items()}
    changes |= {"data.special_tokens": special_tokens, "augmentation.name": "token_dropout"}
    changes |= {"augmentation.options.rate": 0.9}
    augment = build_towers(read_settings(small(**changes))).augment["query"]
    inputs = {"tokens": jnp.arange(1, 7), "length": jnp.int32(5)}
    keys = jax.random.split(jax.random.key(0), 50)
    mask = jax.vmap(lambda key: augment(inputs, key)["mask"])(keys)
    assert mask[:, [0, 4]].all() == bool(ends)
    assert not mask[:, 1:4].all(0).any()
    assert not mask[:, 5].any()
