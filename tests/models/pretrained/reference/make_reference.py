"""Write tiny random models of every family, and the values that the tests compare with.

    python tests/models/pretrained/reference/make_reference.py [NAME ...]

It needs torch, transformers and sentence-transformers; the tests do not. Each of the named models,
by default all, gets a folder here, with `config.json`, `model.safetensors` and `values.npz`:
tokens, their lengths, the hidden states after the embeddings and after the last block, and the
gradient of a scalar with respect to every parameter. `pooling.npz` holds sentence-transformers'
poolings of BERT's states.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
GROUPED = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 32,
}
GEMMA3 = {
    **GROUPED,
    "num_hidden_layers": 3,
    "head_dim": 6,
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Texts are longer than ModernBERT's window and than MPNet's buckets of relative positions.
FAMILIES = {
    "bert": (transformers.BertConfig(**SIZES, max_position_embeddings=24), 20),
    "roberta": (
        transformers.RobertaConfig(
            **SIZES, max_position_embeddings=24, type_vocab_size=1, layer_norm_eps=1e-5
        ),
        20,
    ),
    "xlm-roberta": (
        transformers.XLMRobertaConfig(
            **SIZES, max_position_embeddings=24, type_vocab_size=1, layer_norm_eps=1e-5
        ),
        20,
    ),
    "distilbert": (
        transformers.DistilBertConfig(
            vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24
        ),
        20,
    ),
    "mpnet": (
        transformers.MPNetConfig(**SIZES, max_position_embeddings=152, layer_norm_eps=1e-5),
        150,
    ),
    "modernbert": (
        transformers.ModernBertConfig(
            **SIZES | {"num_hidden_layers": 4},
            max_position_embeddings=32,
            local_attention=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        20,
    ),
    "mistral": (transformers.MistralConfig(**GROUPED, head_dim=6, sliding_window=5), 20),
    "mistral-bidirectional": (
        transformers.MistralConfig(**GROUPED, sliding_window=5, is_causal=False),
        20,
    ),
    "llama": (
        transformers.LlamaConfig(
            **GROUPED | {"max_position_embeddings": 64},
            head_dim=8,
            rope_parameters=LLAMA3,
            attention_bias=True,
            mlp_bias=True,
        ),
        20,
    ),
    "qwen2": (
        transformers.Qwen2Config(
            **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        20,
    ),
    "qwen3": (
        transformers.Qwen3Config(
            **GROUPED,
            head_dim=6,
            rope_parameters={"rope_type": "linear", "rope_theta": 1_000.0, "factor": 2.0},
        ),
        20,
    ),
    "gemma3": (transformers.Gemma3TextConfig(**GEMMA3), 20),
    "gemma3-bidirectional": (
        transformers.Gemma3TextConfig(
            **GEMMA3,
            use_bidirectional_attention=True,
            attention_bias=True,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
        20,
    ),
}
PROMPT_LENGTH = 3
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def random_model(config):
    """A model with random parameters everywhere, even biases and norms, which start as 0 and 1."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gemma adds 1 to the weights of its norms.
            is_scale = name.lower().endswith("norm.weight") and "gemma" not in config.model_type
            parameter.copy_(torch.randn_like(parameter) * 0.2 + is_scale)
    return model


def texts(config, longest):
    """Three texts, padded on the right; one has the full length."""
    length = np.array([longest, longest * 2 // 3, 5])
    mask = np.arange(longest) < length[:, None]
    tokens = np.random.default_rng(0).integers(5, SIZES["vocab_size"], mask.shape)
    return np.where(mask, tokens, config.pad_token_id or 0), length, mask


def make_family(name, config, longest):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = random_model(config)
    tokens, length, mask = texts(config, longest)
    output = model(
        torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask).long(),
        output_hidden_states=True,
    )
    last = output.last_hidden_state
    weights = torch.from_numpy(mask)[..., None].float()
    mean = (last * weights).sum(1) / weights.sum(1)
    cotangent = np.cos(np.arange(mean.numel())).reshape(mean.shape)
    (mean * torch.from_numpy(cotangent).float()).sum().backward()
    gradients = {
        f"gradient {key}": parameter.grad.numpy()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None  # a pooler has none
    }
    (folder / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=1) + "\n")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(
        folder / "values.npz",
        tokens=tokens.astype(np.int32),
        length=length.astype(np.int32),
        first=output.hidden_states[0].detach().numpy(),
        last=last.detach().numpy(),
        mean=mean.detach().numpy(),
        **gradients,
    )
    return last.detach(), torch.from_numpy(mask).long()


def make_pooling(states, mask):
    """Pool with each mode, with and without the prompt; then apply dense layers and normalise."""
    values = {}

    def pooled(modes, include_prompt=True):
        pooling = Pooling(states.shape[2], pooling_mode=modes, include_prompt=include_prompt)
        features = {"token_embeddings": states, "attention_mask": mask}
        return pooling(features | {"prompt_length": PROMPT_LENGTH})["sentence_embedding"]

    for mode in MODES:
        values[mode] = pooled(mode).numpy()
        values[f"{mode} without prompt"] = pooled(mode, include_prompt=False).numpy()
    vectors = pooled(("weightedmean", "max"))
    torch.manual_seed(1)
    layers = (Dense(32, 12), Dense(12, 12, activation_function=torch.nn.GELU(), use_residual=True))
    for number, layer in enumerate(layers):
        vectors = layer({"sentence_embedding": vectors})["sentence_embedding"]
        values[f"dense {number} kernel"] = layer.linear.weight.detach().numpy().T
        values[f"dense {number} bias"] = layer.linear.bias.detach().numpy()
    unit = Normalize()({"sentence_embedding": vectors})["sentence_embedding"]
    np.savez_compressed(HERE / "pooling.npz", dense=unit.detach().numpy(), **values)


def main():
    made = {name: make_family(name, *FAMILIES[name]) for name in sys.argv[1:] or FAMILIES}
    if "bert" in made:
        make_pooling(*made["bert"])
    versions = [
        f"{m.__name__} {m.__version__}" for m in (torch, transformers, sentence_transformers)
    ]
    (HERE / "VERSIONS.txt").write_text("\n".join([*versions, f"numpy {np.__version__}"]) + "\n")


if __name__ == "__main__":
    main()
