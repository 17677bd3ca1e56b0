"""A checkpoint directory of the tiny quickstart's network, with random weights, made without torch."""

import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 77,
}
AUSTEN = pathlib.Path(__file__).parents[2] / "experiments/data/austen"


def tensors(config: dict = CONFIG) -> dict[str, np.ndarray]:
    """The tensors of a Qwen3 checkpoint with this config."""
    rng = np.random.default_rng(0)
    D, F, K = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (H * K, D), "self_attn.k_proj": (G * K, D), "self_attn.v_proj": (G * K, D),
            "self_attn.o_proj": (D, H * K), "self_attn.q_norm": (K,), "self_attn.k_norm": (K,),
            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
            "input_layernorm": (D,), "post_attention_layernorm": (D,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {name: rng.standard_normal(shape, np.float32) * 0.2 for name, shape in shapes.items()}


def write(directory: pathlib.Path, weights: dict[str, np.ndarray] | None = None, **changes) -> pathlib.Path:
    """The directory, with `weights` for tensors and `changes` of config.json (None removes a key)."""
    directory.mkdir(parents=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors() if weights is None else weights, directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(AUSTEN / name, directory / name)
    return directory
