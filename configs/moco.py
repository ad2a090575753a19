"""MoCo: views of images, with a queue of keys from a momentum encoder as negatives.

    python -m jaxcl.train --config configs/moco.py
    python -m jaxcl.train --config configs/moco.py:views --config.data.name=FOLDER

Only the queue comes from the momentum encoder. Unlike in the paper, the keys of a batch are encoded
by the trained encoder, have gradients, and are in-batch negatives. Data and encoders are the same
as in `simclr.py`.
"""

from ml_collections import ConfigDict

from jaxcl.configs import simclr


def get_config(variant: str = "default") -> ConfigDict:
    """`simclr.get_config` of the same variant, with a queue, and a loss from queries to keys."""
    config = simclr.get_config(variant)
    config.loss.name = "infonce"
    config.loss.options.directions = ("query_to_key",)
    config.negatives.bank.kind = "queue"
    config.negatives.bank.slots = 65_536 if variant == "views" else 4_096
    config.negatives.tiers.full_bank = True
    config.negatives.momentum_encoder = ConfigDict({"initial": 0.99, "final": 1.0})
    config.augmentation.name = "moco_v2"
    if variant == "views":
        config.global_batch_size = 256
        config.grad_cache.chunk_size = None
        config.negatives.momentum_encoder.initial = 0.999
    elif variant == "smoke":
        config.negatives.bank.slots = 64
    return config
