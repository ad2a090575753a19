"""Train on the pairs of a file: from scratch, or from a pretrained encoder.

    python -m jaxcl.train --config configs/pairs.py --config.data.name=pairs.jsonl
    python -m jaxcl.train --config configs/pairs.py:finetune --config.data.name=pairs.jsonl \\
        --config.model.pretrained=FOLDER

Each row of the file has a query and a key (`configs/base.py` lists the supported formats). Its
columns are recognised by common names, such as `query` and `positive`. One in twenty queries,
chosen by a hash, is held out for validation; `--config.data.splits.validation=dev.jsonl` uses
another file instead.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.configs import base


def get_config(variant: str = "default") -> ConfigDict:
    """The static encoder of `code_search.py` from random weights.

    `"finetune"` has the settings of `finetune.py` for a pretrained encoder, and `"smoke"` shrinks
    the default to seconds.
    """
    if variant not in ("default", "finetune", "smoke"):
        raise ValueError(f"variant {variant!r} is unknown; use default, finetune or smoke")
    config = base.get_config()
    config.data.splits = ConfigDict({"train": "rest", "validation": "train[:5%]"})
    config.loss.masks = ("row", "text")  # equal queries or keys are not negatives
    if variant == "finetune":
        config.model.name = "pretrained"
        config.data.max_tokens = ConfigDict({"query": 64, "key": 128})
        config.loss.temperature = ConfigDict({"initial": 0.05, "minimum": 0.05, "maximum": 0.05})
        config.optimizer.learning_rate = 5e-5
        config.optimizer.warmup_steps = placeholder(int)  # a tenth of the steps
        config.optimizer.weight_decay = 0.01  # of matrices, not of biases and norms
        config.global_batch_size = config.evaluation.batch_size = 256
        config.grad_cache.chunk_size = 64
    else:
        config.model.name = "static"
        config.data.distinct_tokens = True
        config.augmentation.name = "token_dropout"
        config.augmentation.options.rate = 0.4
    if variant == "smoke":
        config.steps = 20
        config.global_batch_size = 32
        config.optimizer.warmup_steps = 2
    return config
