"""Pairs of any TFDS data set that is prepared as array_record, by name or by folder.

    python -m jaxcl.train --config configs/tfds_pairs.py --config.data.name=my_pairs:1.0.0 \\
        --config.data.query_field=question --config.data.key_field=answer
"""

from ml_collections import ConfigDict

from jaxcl.configs import base


def get_config(variant: str = "default") -> ConfigDict:
    """The static encoder of `code_search` on other data, with random batches.

    `configs/tfds_pairs.py:smoke` is the same, shrunk to seconds.
    """
    if variant not in ("default", "smoke"):
        raise ValueError(f"variant {variant!r} is unknown; use default or smoke")
    config = base.get_config()
    config.data.distinct_tokens = True
    config.augmentation.name = "token_dropout"
    config.augmentation.options.rate = 0.4
    config.assignment.name = "uniform"  # assigned batches have not been measured on other data
    if variant == "smoke":
        config.steps = 20
        config.global_batch_size = 64
        config.optimizer.warmup_steps = 2
        config.assignment.gcbs.refresh_every = 10
    return config
