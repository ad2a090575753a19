"""A search engine over the Python functions installed on this machine.

    python -m jaxcl.train --config configs/code_search.py

On 2 cores of an AMD EPYC: 300 steps in 144 s, the whole command in 197 to 206 s, for the 19,219
functions of jaxcl's own environment. MRR@10 of the model over 3 seeds: .640 to .649 (± .010) on
unseen files, where BM25 has .494, and .454 to .461 (± .007) on the standard library, which is not
in the training data (BM25: .366).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.configs import base
from jaxcl.negatives.tiers import TierBudgets

# Synthetic negatives help here, and help more if built from the batch than from a bank.
SYNTHETIC = TierBudgets(
    mixed=16, mixed_with_query=8, perturbed=8, hardest=32, of_batch=True
)._asdict()


def get_config(variant: str = "default") -> ConfigDict:
    """The configuration, with assigned batches and synthetic negatives by default.

    `configs/code_search.py:plain` has random batches and only in-batch negatives, which all losses
    support. `configs/code_search.py:smoke` is the same, shrunk to seconds.
    """
    if variant not in ("default", "plain", "smoke"):
        raise ValueError(f"variant {variant!r} is unknown; use default, plain or smoke")
    config = base.get_config()
    config.data.name = "code_pairs"
    config.data.code_pairs = ConfigDict(
        {"test_packages": ("stdlib",), "validation_fraction": 0.1, "split_seed": 0}
    )
    config.data.code_pairs.max_pairs = placeholder(int)
    config.data.splits = ConfigDict({"train": "train", "validation": "validation", "test": "test"})
    config.data.group_field = "group"
    config.data.metadata_fields = ("name", "package", "qualified_name", "file", "line")
    config.data.distinct_tokens = True
    config.augmentation.name = "token_dropout"
    config.augmentation.options.rate = 0.4
    config.assignment.name = "gcbs" if variant == "default" else "uniform"
    if variant == "default":
        config.negatives.tiers.update(SYNTHETIC)
        config.assignment.gcbs.refresh_every = 75
    elif variant == "smoke":
        config.steps = 20
        config.global_batch_size = 64
        config.data.code_pairs.max_pairs = 600
        config.optimizer.warmup_steps = 2
        config.assignment.gcbs.refresh_every = 10
    return config
