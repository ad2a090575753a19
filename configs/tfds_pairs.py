"""Pairs of any TFDS data set that is prepared as array_record, by name or by folder.

    python -m jaxcl.train --config configs/tfds_pairs.py --config.data.name=my_pairs:1.0.0 \\
        --config.data.query_field=question --config.data.key_field=answer
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import code_search
from jaxcl.negatives.tiers import TierBudgets


def get_config(variant: str = "default") -> ConfigDict:
    """`code_search.get_config` over another data set: no function names, groups only if named."""
    config = code_search.get_config(variant)
    del config.data.code_pairs
    config.negatives.tiers = ConfigDict(TierBudgets()._asdict())  # made ones are not measured here
    config.data.name = placeholder(str)
    config.data.splits = ConfigDict({"train": "train[:95%]", "validation": "train[95%:]"})
    config.data.group_field = placeholder(str)
    config.data.metadata_fields = ()
    return config
