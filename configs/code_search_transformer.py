"""Code search as in `code_search.py`, with a 6-layer transformer, for accelerators.

python -m jaxcl.train --config configs/code_search_transformer.py
"""

from ml_collections import ConfigDict

from jaxcl.configs import code_search


def get_config(variant: str = "default") -> ConfigDict:
    """`code_search.get_config` with another model, its optimizer and shorter keys.

    Batches are random, with only in-batch negatives, because other settings have not been measured
    with this model.
    """
    config = code_search.get_config("smoke" if variant == "smoke" else "plain")
    config.assignment.name = "uniform"
    config.data.max_tokens = ConfigDict({"query": 64, "key": 256})
    config.data.distinct_tokens = False
    config.model.name = "transformer"
    config.model.dim = 384
    config.augmentation.name = None  # this encoder has dropout
    config.model.options.update(
        {"max_tokens": 256, "hidden_dim": 384, "num_layers": 6, "num_heads": 6, "mlp_dim": 1_536}
        | {"norm_position": "pre", "pooling": "mean", "dropout": 0.1}
    )
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.01
    if variant == "smoke":
        config.model.dim = 32
        config.model.options.update({"hidden_dim": 32, "num_layers": 2, "num_heads": 2})
        config.model.options.mlp_dim = 64
    elif variant not in ("default", "plain"):
        raise ValueError(f"variant {variant!r} is unknown; use default or smoke")
    return config
