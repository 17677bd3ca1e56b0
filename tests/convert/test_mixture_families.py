"""Families with mixtures of experts against `transformers`, and what their config.json cannot say."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.reference.parity import SHAPE, agree

LATENT = {
    "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "moe_intermediate_size": 12,
    "num_key_value_heads": 4, "num_experts_per_tok": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
NEXT = {
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3,
}  # fmt: skip
QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
CAT = LATENT | {
    "q_lora_rank": 14, "n_routed_experts": 4, "zero_expert_num": 0, "moe_topk": 3, "ffn_hidden_size": 40,
    "expert_ffn_hidden_size": 12, "num_layers": 2, "routed_scaling_factor": 1.5, "head_dim": 4, "rms_norm_eps": 1e-4,
}  # fmt: skip
CAT = {key: value for key, value in CAT.items() if key not in ("moe_intermediate_size", "num_experts_per_tok")}
CASES = {
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 3, "sliding_window": 9}),
    "qwen2 moe, a dense layer": (
        "Qwen2Moe",
        {
            "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20, "mlp_only_layers": [1], "num_hidden_layers": 3,
        },
    ),
    "qwen3 moe, every second": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 1, "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 12, "decoder_sparse_step": 2, "norm_topk_prob": True, "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "deepseek v2, groups": (
        "DeepseekV2",
        LATENT | {
            "q_lora_rank": 14, "n_routed_experts": 6, "n_group": 3, "topk_group": 2, "n_shared_experts": 2,
            "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-4,
        },
    ),
    "deepseek v2 lite, YaRN": (
        "DeepseekV2",
        LATENT | {
            "q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek v3, YaRN": (
        "DeepseekV3",
        LATENT | {
            "q_lora_rank": 14, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
            "num_experts_per_tok": 3, "first_k_dense_replace": 1,
            "rope_parameters": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6},
        },
    ),
    "deepseek v3, one group": (
        "DeepseekV3",
        LATENT | {
            "q_lora_rank": None, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
            "first_k_dense_replace": 0, "norm_topk_prob": False, "rope_interleave": False,
        },
    ),
    "qwen3 next": (
        "Qwen3Next",
        NEXT | {"num_hidden_layers": 4, "rms_norm_eps": 1e-4, "rope_parameters": QUARTER},
    ),
    "qwen3 next, biases, a dense layer": (
        "Qwen3Next",
        NEXT | {
            "layer_types": ["full_attention", "linear_attention"], "attention_bias": True, "mlp_only_layers": [0],
            "tie_word_embeddings": True, "norm_topk_prob": False, "linear_num_key_heads": 4, "rope_parameters": QUARTER,
        },
    ),
    "longcat flash": ("LongcatFlash", CAT),
    "longcat flash, zero experts": ("LongcatFlash", CAT | {"zero_expert_num": 3}),
}  # fmt: skip


WITHOUT = {"LongcatFlash": ("num_hidden_layers", "intermediate_size")}  # keys that it calls by another name
DECODED = ("deepseek v3, YaRN",)  # the other mixers decode as the whole row in the contract tests
STD = {"Qwen3Next": 0.15}  # with the others' a rounding of the embedding grows a thousandfold in four layers


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_agree_with_transformers(name, tmp_path, record_property):
    kind, changes = CASES[name]
    shape = {key: value for key, value in SHAPE.items() if key not in WITHOUT.get(kind, ())}
    how = {
        "decode": name in DECODED,
        "std": STD.get(kind, 0.3),
        "complete": dead_rows if kind == "LongcatFlash" else None,
    }
    agree(name, kind, shape | changes, tmp_path, record_property, **how)


def dead_rows(out):
    """Adds to an export the rows that the class has for experts that compute nothing, and no published file has."""
    config = json.loads((out / "config.json").read_text())
    first, count = config["n_routed_experts"], config["zero_expert_num"]
    shape = config["expert_ffn_hidden_size"], config["hidden_size"]
    rows = {
        f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight": np.zeros(shape, np.float32)
        for i in range(config["num_layers"])
        for e in range(first, first + count)
        for part in ("gate", "up")
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(rows, "dead.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    if rows:
        safetensors.numpy.save_file(rows, out / "dead.safetensors", metadata={"format": "pt"})
