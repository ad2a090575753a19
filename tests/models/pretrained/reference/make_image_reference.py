"""Write tiny random CLIP, SigLIP, ViT and DINOv2 models, and values that the tests compare with.

    python tests/models/pretrained/reference/make_image_reference.py [NAME ...]

It needs torch and transformers; the tests do not. Each of the named models, by default all, gets a
folder here, with `config.json`, `model.safetensors` and `values.npz`: normalised pixels of two
sizes and tokens, their embeddings before normalisation, and the gradient of a scalar with respect
to every parameter.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IMAGES = {"image_size": 12, "patch_size": 4}
LARGER = 22  # with pixels at the edges that fill no patch
LONGEST, VOCABULARY, END, PADDING = 12, 60, 50, 1
TEXTS = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST}
MODELS = {
    "clip": transformers.CLIPConfig(
        text_config={**TEXTS, "eos_token_id": END, "bos_token_id": 3, "pad_token_id": PADDING},
        vision_config={**SIZES, **IMAGES, "hidden_size": 20, "num_attention_heads": 4},
        projection_dim=8,
    ),
    "siglip": transformers.SiglipConfig(
        text_config={
            **{**TEXTS, "eos_token_id": PADDING, "bos_token_id": 3},
            **{"pad_token_id": PADDING, "projection_size": 16},
        },
        vision_config={**SIZES, **IMAGES},
    ),
    "vit": transformers.ViTConfig(**SIZES, **IMAGES),
    "dinov2": transformers.Dinov2Config(
        **{name: value for name, value in SIZES.items() if name != "intermediate_size"},
        **IMAGES,
        mlp_ratio=2,
    ),
}


def random_model(config):
    """A model with random parameters everywhere, even biases, norms and layer scales."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name.rpartition(".")[0].rpartition(".")[2] and "weight" in name
            centre = is_scale or "lambda1" in name
            parameter.copy_(torch.randn_like(parameter) * 0.2 + centre)
    return model


def pixels_of(size):
    pixels = np.random.default_rng(size).normal(size=(3, 3, size, size))
    return torch.from_numpy(pixels.astype(np.float32))


def texts():
    """Texts that end with `END` and are padded, one with a second `END`, and larger ids."""
    length = np.array([LONGEST, 7, 4])
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, (3, LONGEST))
    tokens[tokens == END] = END + 1
    mask = np.arange(LONGEST) < length[:, None]
    tokens[np.arange(3), length - 1] = END
    tokens[1, 4] = END
    return np.where(mask, tokens, PADDING), length


def embed_images(model, pixels):
    if model.config.model_type == "clip":
        pooled = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)
        return model.visual_projection(pooled.pooler_output)
    if model.config.model_type == "siglip":
        pooled = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)
        return pooled.pooler_output
    interpolated = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    return model(pixel_values=pixels, **interpolated).last_hidden_state


def embed_texts(model, tokens):
    pooled = model.text_model(input_ids=torch.from_numpy(tokens)).pooler_output
    return model.text_projection(pooled) if model.config.model_type == "clip" else pooled


def scalar_of(vectors):
    cotangent = np.cos(np.arange(vectors.numel())).reshape(vectors.shape)
    return (vectors * torch.from_numpy(cotangent).float()).sum()


def saved_tensors(model):
    """The tensors by their names in files, which differ from those of the modules."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def make_model(name, config):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = random_model(config)
    pixels = {"": pixels_of(IMAGES["image_size"]), "larger ": pixels_of(LARGER)}
    values, total = {}, 0.0
    for size, one in pixels.items():
        images = embed_images(model, one)
        values[f"{size}pixels"] = one
        if images.dim() == 3:  # the states of the class token and of the patches
            values[f"{size}mean"] = images[:, 1:].mean(1)
            images = images[:, 0]
        values[f"{size}image"] = images
        total = total + scalar_of(images)
    if name in ("clip", "siglip"):
        tokens, length = texts()
        values |= {"text": embed_texts(model, tokens)}
        total = total + scalar_of(values["text"])
        if name == "clip":
            model.text_model.eos_token_id = 2  # as in old config files
            values["text by largest id"] = embed_texts(model, tokens)
    tensors = saved_tensors(model)
    total.backward()
    values = {key: value.detach().numpy() for key, value in values.items()}
    with torch.no_grad():  # a pooler and the logit scale have no gradient
        for parameter in model.parameters():
            parameter.copy_(torch.tensor(torch.nan) if parameter.grad is None else parameter.grad)
    gradients = {f"gradient {key}": value for key, value in saved_tensors(model).items()}
    values |= {key: value for key, value in gradients.items() if not np.isnan(value).any()}
    if name in ("clip", "siglip"):
        values |= {"tokens": tokens.astype(np.int32), "length": length.astype(np.int32)}
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "values.npz", **values)


def main():
    for name in sys.argv[1:] or MODELS:
        make_model(name, MODELS[name])
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, np)]
    (HERE / "IMAGE_VERSIONS.txt").write_text("\n".join(versions) + "\n")


if __name__ == "__main__":
    main()
