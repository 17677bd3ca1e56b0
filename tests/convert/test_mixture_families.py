"""Families with mixtures of experts against `transformers`, and what their config.json cannot say."""

import pytest

from tests.reference.parity import SHAPE, agree

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
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_agree_with_transformers(name, tmp_path, record_property):
    kind, changes = CASES[name]
    agree(name, kind, SHAPE | changes, tmp_path, record_property)
