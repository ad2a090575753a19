"""SimCLR: train an image encoder on pairs of views of the same thing.

    python -m jaxcl.train --config configs/simclr.py
    python -m jaxcl.train --config configs/simclr.py:views --config.data.name=FOLDER

The default learns characters across typefaces: the two views are the same character in two of the
DejaVu faces that ship with matplotlib. On 2 cores it takes about two minutes. Recall@1 of unseen
characters in another face is .91 to .94 (3 seeds, standard error .02); comparing pixels reaches
.59. `views` takes two random views of each image of a folder, a file or a TFDS data set. On
held-out rows, both sides are the same image, which is trivial to find; evaluate on labelled images
instead (jaxcl/evaluation/README.md).
"""

from ml_collections import ConfigDict

from jaxcl.configs import base

SHIFTS = {"crop_scale": (0.7, 1.0), "aspect_ratio": (0.85, 1.18), "interpolation": "bilinear"}
"""Crops that move and stretch a character a little; other operations would change the character."""

NO_COLOURS = {"flip_rate": 0.0, "jitter_rate": 0.0, "grayscale_rate": 0.0, "blur_rate": 0.0}


def get_config(variant: str = "default") -> ConfigDict:
    """Characters across faces with a small convolutional encoder.

    `"views"` trains a ResNet-50 on two augmented views of each image, and evaluates it without its
    projection head. `"smoke"` shrinks the default to seconds.
    """
    if variant not in ("default", "views", "smoke"):
        raise ValueError(f"variant {variant!r} is unknown; use default, views or smoke")
    config = base.get_config()
    config.data.modality = ConfigDict({"query": "image", "key": "image"})
    config.loss.name = "nt_xent"
    config.loss.temperature = ConfigDict({"initial": 0.1, "minimum": 0.1, "maximum": 0.1})
    config.augmentation.name = "simclr"
    config.evaluation.methods = ("dense",)
    if variant == "views":
        config.data.query_field = config.data.key_field = "image"
        config.model.name = "resnet"
        config.model.dim = 128
        config.model.options.head = (2_048,)
        config.grad_cache.chunk_size = 128
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 1e-4
        config.evaluation.projection_head = False
        return config
    glyphs(config)
    config.data.key_field = "other"  # the character in another face
    config.data.splits.test = "test_faces"  # DejaVu Sans against Sans Mono Bold Oblique
    config.evaluation.exclude_groups = True  # an equal picture is not a wrong answer
    config.augmentation.options.update(SHIFTS | NO_COLOURS)
    config.model.dim = 128
    config.steps = 400
    if variant == "smoke":
        shrink(config)
    return config


def glyphs(config: ConfigDict) -> None:
    """Use the pictures of characters, and a small image encoder."""
    config.data.name = "glyphs"
    config.data.splits = ConfigDict({"train": "train", "validation": "validation"})
    config.data.query_field = "image"
    config.data.group_field = "group"  # characters that share a picture
    config.data.images.size = 32
    config.loss.masks = ("row", "text", "group")
    config.model.name = "convnet"
    config.global_batch_size = 256
    config.evaluation.batch_size = 512


def shrink(config: ConfigDict) -> None:
    """Shrink a run on the characters to seconds."""
    config.steps = 20
    config.global_batch_size = 32
    config.optimizer.warmup_steps = 2
    config.model.dim = 16
    config.model.options.update({"widths": (8, 16), "hidden_dim": 32})
