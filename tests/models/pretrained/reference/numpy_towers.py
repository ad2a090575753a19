"""Reference implementations of the image and text towers in float64 NumPy, one row at a time.

They compute the same as `jaxcl.models.pretrained`, as plainly as possible, from the tensors of the
files.
"""

import math

import numpy as np

from tests.models.pretrained.reference.numpy_families import (
    attention,
    gelu,
    gelu_tanh,
    heads,
    layer_norm,
)

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}
ENCODER_LAYERS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "attention norm": "layer_norm1",
    "mlp norm": "layer_norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}
VIT_LAYERS = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "attention norm": "layernorm_before",
    "mlp norm": "layernorm_after",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
}
DINOV2_LAYERS = VIT_LAYERS | {
    "attention norm": "norm1",
    "mlp norm": "norm2",
    "widen": "mlp.fc1",
    "narrow": "mlp.fc2",
}


class Weights:
    """Named tensors in float64, with the layers that they belong to."""

    def __init__(self, tensors, epsilon):
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.epsilon = epsilon

    def __getitem__(self, name):
        return self.tensors[name]

    def linear(self, name, x):
        return x @ self[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        return layer_norm(x, self.epsilon) * self[f"{name}.weight"] + self[f"{name}.bias"]


def image_embedding(config, tensors, pixels):
    """Embed the normalised pixels `[c, y, x]` of one image."""
    if config["model_type"] in ("clip", "siglip"):
        return _two_towers_image(config, config["vision_config"], tensors, pixels)
    weights = Weights(tensors, config["layer_norm_eps"])
    x = _patches(weights, "embeddings.patch_embeddings.projection", pixels)
    x = np.concatenate([weights["embeddings.cls_token"][0], x])
    x = x + _positions(config, weights["embeddings.position_embeddings"][0], pixels)
    names = DINOV2_LAYERS if config["model_type"] == "dinov2" else VIT_LAYERS
    x = _blocks(config, weights, "encoder.layer.", names, x, 0.0)
    return weights.norm("layernorm", x)[0]


def _two_towers_image(config, sizes, tensors, pixels):
    weights = Weights(tensors, sizes["layer_norm_eps"])
    at = "vision_model.embeddings"
    x = _patches(weights, f"{at}.patch_embedding", pixels)
    if config["model_type"] == "clip":
        x = np.concatenate([weights[f"{at}.class_embedding"][None], x])
    x = x + _positions(sizes, weights[f"{at}.position_embedding.weight"], pixels)
    if config["model_type"] == "clip":
        x = weights.norm("vision_model.pre_layrnorm", x)
    x = _blocks(sizes, weights, "vision_model.encoder.layers.", ENCODER_LAYERS, x, 0.0)
    x = weights.norm("vision_model.post_layernorm", x)
    if config["model_type"] == "clip":
        return weights.linear("visual_projection", x[0])
    return _attention_pooling(sizes, weights, x)


def text_embedding(config, tensors, tokens):
    """Embed the tokens of one text, without padding."""
    sizes = config["text_config"]
    weights = Weights(tensors, sizes["layer_norm_eps"])
    at = "text_model.embeddings"
    bias = 0.0
    if config["model_type"] == "siglip":
        padding = [sizes["pad_token_id"]] * (sizes["max_position_embeddings"] - len(tokens))
        tokens = [*tokens, *padding]
        place = -1
    else:
        places = np.arange(len(tokens))
        bias = np.where(places[:, None] >= places, 0.0, -np.inf)
        place = list(tokens).index(sizes["eos_token_id"])
    x = weights[f"{at}.token_embedding.weight"][tokens]
    x = x + weights[f"{at}.position_embedding.weight"][: len(tokens)]
    x = _blocks(sizes, weights, "text_model.encoder.layers.", ENCODER_LAYERS, x, bias)
    x = weights.norm("text_model.final_layer_norm", x)[place]
    name = "text_projection" if config["model_type"] == "clip" else "text_model.head"
    return weights.linear(name, x)


def _blocks(sizes, weights, prefix, names, x, bias):
    act, num_heads = ACTIVATIONS[sizes["hidden_act"]], sizes["num_attention_heads"]
    for layer in range(sizes["num_hidden_layers"]):
        at = {part: f"{prefix}{layer}.{name}" for part, name in names.items()}
        scales = [
            weights.tensors.get(f"{prefix}{layer}.layer_scale{number}.lambda1", 1.0)
            for number in (1, 2)
        ]
        ready = weights.norm(at["attention norm"], x)
        queries, keys, values = (
            heads(weights.linear(at[part], ready), num_heads) for part in "qkv"
        )
        x = x + scales[0] * weights.linear(at["o"], attention(queries, keys, values, bias))
        ready = weights.norm(at["mlp norm"], x)
        x = x + scales[1] * weights.linear(at["narrow"], act(weights.linear(at["widen"], ready)))
    return x


def _patches(weights, name, pixels):
    """The projections of all whole patches, row by row."""
    kernel = weights[f"{name}.weight"]
    p = kernel.shape[-1]
    patches = [
        pixels[:, y : y + p, x : x + p]
        for y in range(0, pixels.shape[1] - p + 1, p)
        for x in range(0, pixels.shape[2] - p + 1, p)
    ]
    projected = np.einsum("ncyx,hcyx->nh", np.array(patches, np.float64), kernel)
    return projected + weights.tensors.get(f"{name}.bias", 0.0)


def _positions(sizes, table, pixels):
    """The positions of an image, interpolated unless it has the size of pretraining."""
    grid = sizes["image_size"] // sizes["patch_size"]
    wanted = pixels.shape[1] // sizes["patch_size"]
    if wanted == grid:
        return table
    of_token, of_patches = table[: len(table) - grid**2], table[len(table) - grid**2 :]
    square = of_patches.reshape(grid, grid, -1)
    rows = np.stack([_interpolated(square, grid, wanted, row) for row in range(wanted)])
    columns = rows.transpose(1, 0, 2)
    both = np.stack([_interpolated(columns, grid, wanted, column) for column in range(wanted)])
    return np.concatenate([of_token, both.transpose(1, 0, 2).reshape(wanted**2, -1)])


def _interpolated(values, before, after, place):
    """Bicubic interpolation along the first axis, with the values at the edges repeated."""
    centre = (place + 0.5) * before / after - 0.5
    total = 0.0
    for neighbour in range(math.floor(centre) - 1, math.floor(centre) + 3):
        distance = abs(centre - neighbour)
        if distance < 1:
            weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
        else:
            weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        total = total + weight * values[min(max(neighbour, 0), before - 1)]
    return total


def _attention_pooling(sizes, weights, x):
    at, num_heads = "vision_model.head", sizes["num_attention_heads"]
    kernels = np.split(weights[f"{at}.attention.in_proj_weight"], 3)
    biases = np.split(weights[f"{at}.attention.in_proj_bias"], 3)
    inputs = (weights[f"{at}.probe"][0], x, x)
    queries, keys, values = (
        heads(one @ kernel.T + bias, num_heads)
        for one, kernel, bias in zip(inputs, kernels, biases, strict=True)
    )
    pooled = weights.linear(f"{at}.attention.out_proj", attention(queries, keys, values, 0.0))
    act = ACTIVATIONS[sizes["hidden_act"]]
    ready = weights.norm(f"{at}.layernorm", pooled)
    changed = weights.linear(f"{at}.mlp.fc2", act(weights.linear(f"{at}.mlp.fc1", ready)))
    return (pooled + changed)[0]
