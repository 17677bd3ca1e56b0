"""Every family against the class of `transformers` that it names: tiny random models with the awkward cases."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from layers.context import Context
from maxlike import checkpoint_tree
from maxlike.convert import export_job, transfer
from tests.reference.parity import SHAPE, VOCAB, T, agree, decoded, imported, reference, torch, transformers

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
MIXED = {
    "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3,
    "num_key_value_heads": 2,
}  # fmt: skip
CASES = {
    "llama tied, MHA": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama 3.1, GQA, eps": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 3e-4, "rope_parameters": LLAMA3},
    ),
    "llama biases, odd head": (
        "Llama",
        {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    ),
    "mistral window": ("Mistral", {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5}),
    "qwen2 tied, YaRN": (
        "Qwen2",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": YARN, "rms_norm_eps": 1e-5},
    ),
    "qwen2 windows": ("Qwen2", MIXED),
    "qwen3 head_dim": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "starcoder2": ("Starcoder2", {"num_key_value_heads": 2, "sliding_window": 9, "norm_epsilon": 1e-3}),
    "glm": (
        "Glm",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 5e6},
        },
    ),
    "glm4": ("Glm4", {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-4}),
    "gpt2": ("GPT2", {}),
    "gpt2 untied, exact gelu": (
        "GPT2",
        {"n_inner": 44, "tie_word_embeddings": False, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    ),
}
CASES["gpt2"][1].update(n_head=4, n_layer=2, n_embd=32, n_positions=128, vocab_size=VOCAB)
CASES["gpt2 untied, exact gelu"][1].update(CASES["gpt2"][1])


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_agree_with_transformers(name, tmp_path, record_property):
    kind, changes = CASES[name]
    agree(name, kind, ({} if kind == "GPT2" else SHAPE) | changes, tmp_path, record_property)


def test_bert_gives_the_same_hidden_states(tmp_path, record_property):
    """One segment; the export, without token types of its own, is the same function."""
    config = transformers.BertConfig(**SHAPE, type_vocab_size=3, layer_norm_eps=1e-3, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, T))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).last_hidden_state.numpy()
    family, graph, params, net = imported(tmp_path / "theirs")
    found = jax.jit(lambda params, x: nnx.merge(graph, params)(x, Context.of(x)).hidden_BTD)(params, tokens)
    worst = float(np.abs(np.asarray(found) - theirs).max())
    record_property("worst bert (hidden states)", worst)
    assert worst <= 1e-4
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(export_job.describe(net)[1]))
    flat = checkpoint_tree.flatten(params)
    transfer.store(family, net, flat, directory=tmp_path / "ours", dtype="float32", shard_bytes=10**9)
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        assert np.abs(again(torch.tensor(tokens)).last_hidden_state.numpy() - theirs).max() <= 1e-5


def test_decoding_an_imported_model_gives_the_same_64_tokens(tmp_path):
    kind, changes = CASES["qwen2 windows"]
    tokens, _ = reference(kind, SHAPE | changes, tmp_path)
    _, graph, params, _ = imported(tmp_path)
    assert np.array_equal(decoded(graph, params, tokens), tokens[:, T:])
