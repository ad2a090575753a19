"""Images and captions, as in CLIP and SigLIP: two different encoders with one embedding space.

    python -m jaxcl.train --config configs/image_text.py
    python -m jaxcl.train --config configs/image_text.py:locked --config.data.name=PAIRS \\
        --config.model.pretrained=FOLDER

The default trains on pictures of characters in the DejaVu faces that ship with matplotlib, with
their Unicode names as captions. On 2 cores it takes about two minutes. Recall@1 from pictures of
unseen characters to their names is .46 to .48 (3 seeds, standard error .02); comparing pixels
reaches .19. `locked` trains a text encoder for a frozen pretrained image encoder.
"""

from ml_collections import ConfigDict

from jaxcl.configs import base, simclr


def get_config(variant: str = "default") -> ConfigDict:
    """InfoNCE over a small convolutional encoder and a static encoder of names.

    `"siglip"` has the sigmoid loss of all pairs instead. `"locked"` has a pretrained image encoder
    with frozen weights, such as a ViT, and a transformer for captions. `"smoke"` and
    `"smoke_siglip"` shrink the first two to seconds.
    """
    known = ("default", "siglip", "locked", "smoke", "smoke_siglip")
    if variant not in known:
        raise ValueError(f"variant {variant!r} is unknown; use {', '.join(known)}")
    config = base.get_config()
    config.data.modality = ConfigDict({"query": "image", "key": "text"})
    config.model.shared = False
    config.augmentation.name = "clip"
    config.augmentation.sides = ("query",)
    config.evaluation.methods = ("dense",)
    config.loss.temperature = ConfigDict({"initial": 0.07, "minimum": 0.01, "maximum": 1.0})
    if variant == "locked":
        _locked(config)
        return config
    simclr.glyphs(config)
    config.data.key_field = "caption"
    config.data.splits.test = "test_sans"  # the pictures in DejaVu Sans
    config.data.vocabulary_size = 2_048
    config.data.max_tokens.key = 24
    config.data.distinct_tokens = True
    config.augmentation.options.update(simclr.SHIFTS)
    config.model.dim = 128
    config.model.key.name = "static"
    config.steps = 600
    if variant.endswith("siglip"):
        config.loss.name = "sigmoid"
        config.loss.bias = -10.0
        config.loss.temperature.initial = 0.1
    if variant.startswith("smoke"):
        simclr.shrink(config)
        config.data.vocabulary_size = 300
    return config


def _locked(config: ConfigDict) -> None:
    config.model.name = "pretrained"
    config.model.key.name = "transformer"
    config.optimizer.freeze = ("towers/query/*",)
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.01
    config.data.query_field = "image"
    config.data.key_field = "caption"
    config.data.max_tokens.key = 64
    config.loss.masks = ("row", "text")
    config.grad_cache.chunk_size = 128
