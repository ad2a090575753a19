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
    if "num_key_value_heads" in config:
        return _decoder(config, weights, tokens)
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


def _decoder(config, weights, tokens):
    gemma = config["model_type"] == "gemma3_text"
    num_heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // num_heads
    scale = config["query_pre_attn_scalar"] if gemma else width
    act = gelu_tanh if gemma else silu

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(name, x):
        mean_square = (x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]
        return x / np.sqrt(mean_square) * (weights[f"{name}.weight"] + gemma)

    x = weights["embed_tokens.weight"][tokens] * (math.sqrt(config["hidden_size"]) if gemma else 1)
    for layer in range(config["num_hidden_layers"]):
        block = f"layers.{layer}"
        ready = norm(f"{block}.input_layernorm", x)
        queries, keys, values = (
            heads(linear(f"{block}.self_attn.{part}_proj", ready), number)
            for part, number in (("q", num_heads), ("k", key_heads), ("v", key_heads))
        )
        if f"{block}.self_attn.q_norm.weight" in weights:
            queries = norm(f"{block}.self_attn.q_norm", queries)
            keys = norm(f"{block}.self_attn.k_norm", keys)
        queries, keys = (rotate_by(side, angles(config, layer, width)) for side in (queries, keys))
        shared = [head // (num_heads // key_heads) for head in range(num_heads)]
        # `attention` divides by the square root of the width.
        queries = queries * math.sqrt(width / scale)
        mixed = attention(queries, keys[shared], values[shared], unseen(config, layer, len(x)))
        mixed = linear(f"{block}.self_attn.o_proj", mixed)
        if gemma:
            mixed = norm(f"{block}.post_attention_layernorm", mixed)
        x = x + mixed
        name = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        ready = norm(f"{block}.{name}", x)
        wide = act(linear(f"{block}.mlp.gate_proj", ready)) * linear(f"{block}.mlp.up_proj", ready)
        changed = linear(f"{block}.mlp.down_proj", wide)
        x = x + (norm(f"{block}.post_feedforward_layernorm", changed) if gemma else changed)
    return norm("norm", x)


def unseen(config, layer, t):
    """A bias that is -inf where a token does not attend to another one."""
    bias = np.zeros((t, t))
    kinds = config.get("layer_types")
    slides = config["model_type"] == "mistral" if kinds is None else "sliding" in kinds[layer]
    window = config["sliding_window"] if slides else t
    both_ways = config.get("use_bidirectional_attention") or not config.get("is_causal", True)
    for q in range(t):
        for k in range(t):
            if not both_ways:
                seen = 0 <= q - k < window
            elif slides and config["model_type"] == "gemma3_text":
                seen = abs(q - k) <= window // 2
            else:
                seen = abs(q - k) <= window
            bias[q, k] = 0.0 if seen else -math.inf
    return bias


def angles(config, layer, width):
    """The angle per token of each pair of features."""
    rope = config["rope_parameters"]
    rope = rope.get((config.get("layer_types") or [""] * (layer + 1))[layer], rope)
    step = rope["rope_theta"] ** (-np.arange(0, width, 2) / width)
    if rope["rope_type"] == "linear":
        return step / rope["factor"]
    if rope["rope_type"] == "default":
        return step
    longest = rope["original_max_position_embeddings"]
    scaled = []
    for one in step:
        wavelength = 2 * math.pi / one
        if wavelength < longest / rope["high_freq_factor"]:
            scaled.append(one)
        elif wavelength > longest / rope["low_freq_factor"]:
            scaled.append(one / rope["factor"])
        else:
            blend = longest / wavelength - rope["low_freq_factor"]
            blend /= rope["high_freq_factor"] - rope["low_freq_factor"]
            scaled.append((1 - blend) * one / rope["factor"] + blend * one)
    return np.array(scaled)


def first_position(config):
    if config["model_type"] in ("roberta", "xlm-roberta"):
        return config["pad_token_id"] + 1
    return 2 if config["model_type"] == "mpnet" else 0


def layer_norm(x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x):
    return x / (1 + np.exp(-x))


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
    return rotate_by(x, base ** (-np.arange(half) / half))


def rotate_by(x, step):
    """Rotate features i and i + c/2 of the token at position p by the angle p · step_i."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * step)
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
