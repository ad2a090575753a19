"""Reference implementations of the families in float64 NumPy, one text at a time, without padding.

They compute the same as `jaxcl.models.pretrained`, as plainly as possible. Other implementations
round some steps to float32; these do not.
"""

import math

import numpy as np
from scipy.special import erf

MPNET_BUCKETS, MPNET_FURTHEST = 32, 128


def hidden_states(config, tensors, tokens):
    """Compute the states `[t, h]` after the last block for the tokens `[t]` of one text."""
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    if config["model_type"] == "modernbert":
        return _modernbert(config, weights, tokens)
    return _bert_like(config, weights, tokens)


def _bert_like(config, weights, tokens):
    names = NAMES.get(config["model_type"], BERT_NAMES)
    epsilon = config.get("layer_norm_eps", 1e-12)
    num_heads = config.get("num_attention_heads", config.get("n_heads"))
    num_layers = config.get("num_hidden_layers", config.get("n_layers"))

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, epsilon) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    positions = np.arange(len(tokens)) + first_position(config)
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][positions]
    if "embeddings.token_type_embeddings.weight" in weights:
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    bias = 0.0
    if config["model_type"] == "mpnet":
        table = weights["encoder.relative_attention_bias.weight"]
        bias = np.array([[table[bucket(k - q)] for k in range(len(x))] for q in range(len(x))])
        bias = bias.transpose(2, 0, 1)
    for layer in range(num_layers):
        at = {part: name.format(layer) for part, name in names.items()}
        queries, keys, values = (heads(linear(at[part], x), num_heads) for part in "qkv")
        mixed = linear(at["o"], attention(queries, keys, values, bias))
        x = norm(at["attention norm"], x + mixed)
        x = norm(at["mlp norm"], x + linear(at["narrow"], gelu(linear(at["widen"], x))))
    return x


def _modernbert(config, weights, tokens):
    epsilon, num_heads = config["norm_eps"], config["num_attention_heads"]

    def norm(name, x):
        return layer_norm(x, epsilon) * weights[f"{name}.weight"]

    x = norm("embeddings.norm", weights["embeddings.tok_embeddings.weight"][tokens])
    places = np.arange(len(tokens))
    distance = np.abs(places[:, None] - places)
    for layer, kind in enumerate(config["layer_types"]):
        block = f"layers.{layer}"
        window = config["local_attention"] // 2 if kind == "sliding_attention" else math.inf
        bias = np.where(distance <= window, 0.0, -np.inf)
        base = config["rope_parameters"][kind]["rope_theta"]
        ready = x if layer == 0 else norm(f"{block}.attn_norm", x)
        joint = ready @ weights[f"{block}.attn.Wqkv.weight"].T
        queries, keys, values = (heads(part, num_heads) for part in np.split(joint, 3, axis=-1))
        mixed = attention(rotate(queries, base), rotate(keys, base), values, bias)
        x = x + mixed @ weights[f"{block}.attn.Wo.weight"].T
        wide = norm(f"{block}.mlp_norm", x) @ weights[f"{block}.mlp.Wi.weight"].T
        through, gates = np.split(wide, 2, axis=-1)
        x = x + (gelu(through) * gates) @ weights[f"{block}.mlp.Wo.weight"].T
    return norm("final_norm", x)


def first_position(config):
    if config["model_type"] in ("roberta", "xlm-roberta"):
        return config["pad_token_id"] + 1
    return 2 if config["model_type"] == "mpnet" else 0


def layer_norm(x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def heads(x, num_heads):
    """Split `[t, h]` into heads, `[n, t, c]`."""
    return x.reshape(len(x), num_heads, -1).transpose(1, 0, 2)


def attention(queries, keys, values, bias):
    scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(queries.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ values
    return mixed.transpose(1, 0, 2).reshape(mixed.shape[1], -1)


def rotate(x, base):
    """Rotate features i and i + c/2 of the token at position p by the angle p · base^(-2i/c)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def bucket(offset):
    """MPNet's bucket for a key that lies `offset` tokens after the query."""
    half = MPNET_BUCKETS // 2
    start, distance = (half, offset) if offset > 0 else (0, -offset)
    exact = half // 2
    if distance < exact:
        return start + distance
    growth = math.log(distance / exact) / math.log(MPNET_FURTHEST / exact)
    return start + min(exact + int(growth * (half - exact)), half - 1)


BERT_NAMES = {
    "q": "encoder.layer.{}.attention.self.query",
    "k": "encoder.layer.{}.attention.self.key",
    "v": "encoder.layer.{}.attention.self.value",
    "o": "encoder.layer.{}.attention.output.dense",
    "attention norm": "encoder.layer.{}.attention.output.LayerNorm",
    "widen": "encoder.layer.{}.intermediate.dense",
    "narrow": "encoder.layer.{}.output.dense",
    "mlp norm": "encoder.layer.{}.output.LayerNorm",
}
NAMES = {
    "distilbert": {
        "q": "transformer.layer.{}.attention.q_lin",
        "k": "transformer.layer.{}.attention.k_lin",
        "v": "transformer.layer.{}.attention.v_lin",
        "o": "transformer.layer.{}.attention.out_lin",
        "attention norm": "transformer.layer.{}.sa_layer_norm",
        "widen": "transformer.layer.{}.ffn.lin1",
        "narrow": "transformer.layer.{}.ffn.lin2",
        "mlp norm": "transformer.layer.{}.output_layer_norm",
    },
    "mpnet": {
        "q": "encoder.layer.{}.attention.attn.q",
        "k": "encoder.layer.{}.attention.attn.k",
        "v": "encoder.layer.{}.attention.attn.v",
        "o": "encoder.layer.{}.attention.attn.o",
        "attention norm": "encoder.layer.{}.attention.LayerNorm",
        "widen": "encoder.layer.{}.intermediate.dense",
        "narrow": "encoder.layer.{}.output.dense",
        "mlp norm": "encoder.layer.{}.output.LayerNorm",
    },
}
