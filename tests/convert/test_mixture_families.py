"""Families with mixtures of experts against `transformers`, and what their config.json cannot say."""

import pytest

from tests.reference.parity import SHAPE, agree

LATENT = {
    "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "moe_intermediate_size": 12,
    "num_key_value_heads": 4, "num_experts_per_tok": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
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
            "num_experts_per_tok": 3, "first_k_dense_replace": 1, "num_hidden_layers": 3,
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
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_agree_with_transformers(name, tmp_path, record_property):
    kind, changes = CASES[name]
    agree(name, kind, SHAPE | changes, tmp_path, record_property)
