"""Large encoders, with the sizes of BERT base, Mistral 7B and CLIP, on any data set.

    python -m jaxcl.train --config configs/large_encoders.py:bert_base --config.data.name=…
    python -m jaxcl.plan --config configs/large_encoders.py:mistral_7b --topology v5e:16x16

`bert_base`, `mistral_7b` and `mistral_7b_lora` start from random weights; use them to plan the
memory of a pod. `pretrained_7b`, `clip` and `siglip` fine-tune the weights of a folder, such as
those of e5-mistral-7b-instruct and clip-vit-base-patch16. A plan needs only the copy of the folder
in a run's workdir, which has no weights:

    python -m jaxcl.plan --config configs/large_encoders.py:pretrained_7b --topology v5e:16x16 \\
        --config.model.pretrained=FOLDER
"""

from ml_collections import ConfigDict

from jaxcl.configs import base


def get_config(variant: str = "bert_base") -> ConfigDict:
    """The defaults with a large model, one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    config = base.get_config()
    config.optimizer.weight_decay = 0.01
    VARIANTS[variant](config)
    return config


def _bert_base(config: ConfigDict) -> None:
    """BERT base (Devlin et al., 2019), with 110 million parameters and batches of 32,768."""
    config.data.vocabulary_size = 30_522
    config.data.max_tokens = ConfigDict({"query": 64, "key": 256})
    config.global_batch_size = 32_768
    config.model.name = "transformer"
    config.model.dim = 768
    config.model.options.update(
        {"max_tokens": 512, "hidden_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3_072}
        | {"norm_position": "post", "pooling": "mean", "dropout": 0.1}
        | {"remat": True, "scan_layers": True}
    )
    config.optimizer.learning_rate = 2e-4
    config.grad_cache.chunk_size = 32


def _mistral_7b(config: ConfigDict) -> None:
    """Mistral 7B (Jiang et al., 2023) as an embedder (Wang et al., 2024), with batches of 2,048."""
    config.data.vocabulary_size = 32_000
    config.data.max_tokens = ConfigDict({"query": 512, "key": 512})
    config.global_batch_size = 2_048
    config.model.name = "decoder"
    config.model.dim = 4_096
    config.model.options.update(
        {"max_tokens": 512, "hidden_dim": 4_096, "num_layers": 32, "mlp_dim": 14_336}
        | {"num_heads": 32, "num_key_heads": 8, "rotary_base": 10_000.0, "dropout": 0.0}
        | {"remat": True}
    )
    config.optimizer.learning_rate = 1e-5
    config.run.mesh.fsdp = 64
    config.grad_cache.chunk_size = 4


def _pretrained_7b(config: ConfigDict) -> None:
    """A pretrained decoder of 7 billion parameters; the batch and mesh of `mistral_7b`."""
    config.data.max_tokens = ConfigDict({"query": 512, "key": 512})
    config.data.distinct_tokens = False
    config.global_batch_size = 2_048
    config.model.name = "pretrained"
    config.model.options.update({"dropout": 0.0, "remat": True})
    config.optimizer.learning_rate = 1e-5
    config.run.mesh.fsdp = 64
    config.grad_cache.chunk_size = 4


def _mistral_7b_lora(config: ConfigDict) -> None:
    """`mistral_7b` with LoRA adapters of rank 16 on frozen bfloat16 kernels."""
    _mistral_7b(config)
    config.model.lora.update({"rank": 16, "base_dtype": "bfloat16"})
    config.optimizer.learning_rate = 1e-4


def _image_text(config: ConfigDict) -> None:
    """Images and captions with the two towers of a pretrained folder, in batches of 32,768."""
    config.data.modality = ConfigDict({"query": "image", "key": "text"})
    config.data.query_field, config.data.key_field = "image", "caption"
    config.data.distinct_tokens = False
    config.global_batch_size = 32_768
    config.model.name = "pretrained"
    config.model.shared = False
    config.model.options.update({"dropout": 0.0, "remat": True})
    config.evaluation.methods = ("dense",)
    config.optimizer.learning_rate = 1e-5


def _clip(config: ConfigDict) -> None:
    """CLIP (Radford et al., 2021): InfoNCE over the gathered batch."""
    _image_text(config)
    config.data.max_tokens = ConfigDict({"query": 77, "key": 77})


def _siglip(config: ConfigDict) -> None:
    """SigLIP (Zhai et al., 2023): the sigmoid loss, with keys exchanged in a ring."""
    _image_text(config)
    config.data.max_tokens = ConfigDict({"query": 64, "key": 64})
    config.loss.name = "sigmoid"
    config.loss.exchange = "ring"


VARIANTS = {
    "bert_base": _bert_base,
    "clip": _clip,
    "mistral_7b": _mistral_7b,
    "mistral_7b_lora": _mistral_7b_lora,
    "pretrained_7b": _pretrained_7b,
    "siglip": _siglip,
}
