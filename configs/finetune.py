"""Fine-tune a pretrained encoder: code search, with docstrings as queries.

    python -m jaxcl.train --config configs/finetune.py --config.model.pretrained=FOLDER

FOLDER is a text encoder saved by sentence-transformers or transformers, with `config.json`,
`model.safetensors` and `tokenizer.json`. The run uses its tokenizer, prompts, pooling and width.
The encoder may have seen some of the held-out code in its pretraining.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.configs import code_search


def get_config(variant: str = "default") -> ConfigDict:
    """The pairs of `code_search.py`, with an optimizer for fine-tuning; `"smoke"` shrinks the run.

    For other pairs, set `data.name` and the fields that hold the texts.
    """
    if variant not in ("default", "smoke"):
        raise ValueError(f"variant {variant!r} is unknown; use default or smoke")
    config = code_search.get_config("smoke" if variant == "smoke" else "plain")
    config.model.name = "pretrained"
    config.data.distinct_tokens = False
    config.data.max_tokens = ConfigDict({"query": 64, "key": 128})
    config.augmentation.name = None  # the encoder has dropout
    config.loss.masks = ("row", "text")
    config.loss.temperature = ConfigDict({"initial": 0.05, "minimum": 0.05, "maximum": 0.05})
    config.optimizer.learning_rate = 5e-5
    config.optimizer.weight_decay = 0.01  # of matrices, not of biases and norms
    config.global_batch_size = 256
    config.grad_cache.chunk_size = 64
    config.optimizer.warmup_steps = placeholder(int)  # a tenth of the steps
    config.evaluation.batch_size = 256
    if variant == "smoke":
        config.global_batch_size = config.evaluation.batch_size = 16
        config.data.max_tokens = ConfigDict({"query": 12, "key": 16})
    return config
