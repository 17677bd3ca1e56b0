"""config.json as the publishers of mixtures, Mamba-2 and encoders wrote it: the network has the published size, and is
the one of the published experiment."""

import math

import pytest

from maxlike import config
from maxlike.convert import export_job, families, structure
from maxlike.convert.structure import Cannot

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    }),
    "deepseek_v3": (671_026_404_352, DEEPSEEK_V3),
    "longcat_flash": (560_664_958_976, {
        "architectures": ["LongcatFlashForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_method": "MLA", "auto_map": {"AutoConfig": "configuration_longcat_flash.LongcatFlashConfig"},
        "bos_token_id": 1, "eos_token_id": 2, "expert_ffn_hidden_size": 2048, "ffn_hidden_size": 12288,
        "hidden_size": 6144, "kv_lora_rank": 512, "max_position_embeddings": 131072, "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True, "model_type": "longcat_flash", "moe_topk": 12,
        "n_routed_experts": 512, "num_attention_heads": 64, "num_layers": 28,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05,
        "rope_theta": 10000000.0, "routed_scaling_factor": 6.0, "router_bias": False, "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 131072, "zero_expert_num": 256,
        "zero_expert_type": "identity",
    }),
    "mamba2_2_7b": (2_702_599_680, {
        "architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.1, "layer_norm_epsilon": 1e-05,
        "model_type": "mamba2", "n_groups": 1, "norm_before_gate": False, "num_heads": 80, "num_hidden_layers": 64,
        "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "state_size": 128,
        "tie_word_embeddings": True, "time_step_floor": 0.0001, "time_step_limit": [0.0, math.inf],
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 160, "use_bias": False, "use_cache": True,
        "use_conv_bias": True, "vocab_size": 50288,
    }),
    "ettin_150m": (None, {
        "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 50281, "causal_mask": False, "classifier_activation": "gelu", "classifier_bias": False,
        "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True,
        "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
        "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
        "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 160000.0,
        "max_position_embeddings": 7999, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert",
        "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 12, "num_hidden_layers": 22,
        "pad_token_id": 50283, "position_embedding_type": "absolute", "sep_token_id": 50282,
        "sparse_pred_ignore_index": -100, "sparse_prediction": False, "torch_dtype": "float32", "vocab_size": 50368,
    }),
}  # fmt: skip
# What the experiments set otherwise, knob by knob, because the paper trains so and the checkpoint is of a later stage.
OTHERWISE = {"ettin_150m": {"RoPE.base"}}
SIZES = {
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192,
        "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "DeepSeek-V2-Lite": (15_706_484_224, {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        }, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "vocab_size": 102400,
    }),
    "t5-v1_1-small": (76_961_152, {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 1024, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8, "output_past": True, "pad_token_id": 0,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "vocab_size": 32128,
    }),
}  # fmt: skip


def network(values):
    return structure.of(families.network(values, "config.json")[1])


def size(net) -> int:
    return sum(math.prod(parameter.shape) for parameter in net.parameters.values() if not parameter.buffer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_experiment_is_the_network_of_the_checkpoint(name):
    expected, values = PUBLISHED[name]
    net = network(values)
    assert expected is None or size(net) == expected
    experiment = structure.Structure(config.load(f"published/{name}").bare())
    table = structure.difference(net, experiment, ("config.json", "experiment"))
    rows = [] if table is None else table.splitlines()[1:]
    assert all(any(knob in row for knob in OTHERWISE.get(name, ())) for row in rows), table
    assert len(rows) == len(OTHERWISE.get(name, ()))


@pytest.mark.parametrize("name", SIZES)
def test_the_published_size_comes_out(name):
    expected, values = SIZES[name]
    assert size(network(values)) == expected


@pytest.mark.parametrize("name", PUBLISHED | SIZES)
def test_an_export_finds_the_family_by_itself(name):
    """Every family looks at networks of all the others, and each is written as what it was read as."""
    values = (PUBLISHED | SIZES)[name][1]
    family, written = export_job.describe(network(values))
    assert family.model_type == values["model_type"]
    again = structure.of(families.network(written, "config.json")[1])
    assert structure.difference(again, network(values), ("written", "read")) is None


def test_what_only_training_knows_is_no_difference():
    """Losses, jitter, capacity and the rule of a bias; but dropping tokens in evaluation is one."""
    imports = ["import layers.balance", "import layers.dispatch"]

    def table(name, *bindings):
        experiment = structure.Structure(config.load(f"published/{name}", bindings=[*imports, *bindings]).bare())
        return structure.difference(network(PUBLISHED[name][1]), experiment, ("config.json", "experiment"))

    capacity = "moe.MoE.dispatch = @layers.dispatch.Capacity"
    losses = "moe.MoE.losses = (@balance.LoadBalance, @layers.balance.ZLoss)"
    assert table("mixtral_8x7b", losses, capacity, "routers.TopK.jitter = 0.1") is None
    assert "Capacity.evaluation_factor" in table(
        "mixtral_8x7b", capacity, "layers.dispatch.Capacity.evaluation_factor = 1.0"
    )
    assert table("deepseek_v3", "balance.SignBias.rate = 0.01") is None
    assert "router/bias" in table("deepseek_v3", "routers.TopK.bias = None")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral_8x7b", {"num_experts_per_tok": 9}, "TopK.top_k=9"),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v3", {"num_key_value_heads": 16}, "num_key_value_heads = 16"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("deepseek_v3", {"n_group": 7}, "GroupLimit.groups=7"),
        ("deepseek_v3", {"kv_lora_rank": None}, "no kv_lora_rank"),
        ("longcat_flash", {"zero_expert_type": "copy"}, "zero_expert_type = 'copy'"),
        ("longcat_flash", {"q_lora_rank": None}, "no q_lora_rank"),
        ("mamba2_2_7b", {"expand": 3}, "expand does not lead to 80 heads of 64"),
        ("mamba2_2_7b", {"time_step_limit": [1.0]}, r"time_step_limit = .1\.0. must be two numbers"),
        ("mamba2_2_7b", {"use_bias": True}, "use_bias = True"),
        ("ettin_150m", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("ettin_150m", {"causal_mask": True}, "causal_mask = True"),
        ("t5-v1_1-small", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh'"),
        ("t5-v1_1-small", {"relative_attention_num_buckets": 7}, "RelativeBias.buckets=7"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(name, changes, words):
    with pytest.raises(Cannot, match=words):
        network((PUBLISHED | SIZES)[name][1] | changes)
