"""The same weights give the same logits as `transformers`: tiny random models, weights mapped by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Embed, Head
from layers.language_model import LanguageModel
from layers.mlp import MLP, GatedMLP
from layers.norm import LayerNorm, RMSNorm
from layers.rope import LinearScaling, Llama3Scaling, RoPE, YaRN
from layers.stack import Stack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

F = functools.partial
VOCAB, D, FFN, H, G, K, LAYERS, T = 48, 32, 40, 4, 2, 8, 2, 24
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, T))
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": FFN, "num_attention_heads": H,
    "num_key_value_heads": G, "num_hidden_layers": LAYERS, "max_position_embeddings": 64, "head_dim": K,
    "attn_implementation": "eager", "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def random_weights(model) -> dict[str, np.ndarray]:
    """Gives every weight, bias and gain of a torch model a random value and returns them by name."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


def decoder_params(weights: dict[str, np.ndarray], tied: bool) -> dict:
    """Llama's names to ours: a torch weight is [out, in], ours [in, out] with heads apart; layers are stacked."""

    def stacked(name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        layers = [weights[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)]
        return np.stack([w if shape is None else w.T.reshape(shape) for w in layers])

    mixer = {
        "query": {"kernel": stacked("self_attn.q_proj", (D, H, K))},
        "key": {"kernel": stacked("self_attn.k_proj", (D, G, K))},
        "value": {"kernel": stacked("self_attn.v_proj", (D, G, K))},
        "out": {"kernel": stacked("self_attn.o_proj", (H, K, D))},
    }
    if "model.layers.0.self_attn.q_norm.weight" in weights:
        mixer |= {
            "query_norm": {"gain": stacked("self_attn.q_norm")},
            "key_norm": {"gain": stacked("self_attn.k_norm")},
        }
    block = {
        "mixer": mixer,
        "mixer_norm": {"gain": stacked("input_layernorm")},
        "ffn_norm": {"gain": stacked("post_attention_layernorm")},
        "ffn": {
            "gate": {"kernel": stacked("mlp.gate_proj", (D, FFN))},
            "up": {"kernel": stacked("mlp.up_proj", (D, FFN))},
            "down": {"kernel": stacked("mlp.down_proj", (FFN, D))},
        },
    }
    params = {
        "embed": {"table": weights["model.embed_tokens.weight"]},
        "norm": {"gain": weights["model.norm.weight"]},
        "stack": {"periods": {0: block}},
    }
    return params if tied else params | {"head": {"linear": {"kernel": weights["lm_head.weight"].T}}}


def our_logits(make, params) -> np.ndarray:
    """Logits of our model under a hand-mapped tree, which must have exactly the model's structure and shapes."""
    graph, state = jax.eval_shape(lambda: nnx.split(make(nnx.Rngs(params=0))))
    expected = nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    tokens_BT = jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_BT, Context.of(tokens_BT)).hidden_BTD)

    return np.asarray(run(jax.tree.map(jnp.asarray, params)))


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
CASES = {
    # their class, their knobs, our attention, our rope
    "llama_untied": ("Llama", {}, {}, RoPE),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, {}, RoPE),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {},
        F(RoPE, scaling=F(LinearScaling, factor=4.0)),
    ),
    "llama_yarn": (
        "Llama",
        {"rope_parameters": YARN | {"rope_theta": 10000.0}},
        {},
        F(RoPE, scaling=F(YaRN, factor=4.0, original_length=16, beta_fast=4.0)),
    ),
    "llama_llama3": (
        "Llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
        {},
        F(RoPE, base=500.0, scaling=F(Llama3Scaling, factor=8.0, original_length=32)),
    ),
    "qwen3": ("Qwen3", {}, {"qk_norm": RMSNorm}, RoPE),
    "mistral": ("Mistral", {"sliding_window": 7}, {"window": 7}, RoPE),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_family(name, record_property):
    family, theirs, attention, rope = CASES[name]
    theirs = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6} | theirs
    tied = theirs["tie_word_embeddings"]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **theirs)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    block = F(
        Block,
        mixer=F(Attention, heads=H, kv_heads=G, head_dim=K, rope=rope, **attention),
        ffn=F(GatedMLP, width=FFN),
        norm=RMSNorm,
    )
    stack = F(Stack, pattern=(block,), depth=LAYERS)
    params = decoder_params(random_weights(model), tied)
    got = our_logits(
        lambda rngs: LanguageModel(vocab=VOCAB, dim=D, stack=stack, norm=RMSNorm, head=F(Head, tied=tied), rngs=rngs),
        params,
    )
    want = their_logits(model)
    record_property(f"worst {name}, weights by hand", float(np.abs(np.asarray(got) - np.asarray(want)).max()))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_gpt2(record_property):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=H, n_inner=FFN, n_positions=64, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config)
    weights = random_weights(model)

    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"transformer.h.{i}.{name}"] for i in range(LAYERS)])

    qkv = np.split(stacked("attn.c_attn.weight"), 3, -1)  # GPT-2's Conv1D keeps [in, out]
    qkv_bias = np.split(stacked("attn.c_attn.bias"), 3, -1)
    mixer = {
        name: {"kernel": w.reshape(LAYERS, D, H, K), "bias": b.reshape(LAYERS, H, K)}
        for name, w, b in zip(("query", "key", "value"), qkv, qkv_bias, strict=True)
    }
    mixer["out"] = {
        "kernel": stacked("attn.c_proj.weight").reshape(LAYERS, H, K, D), "bias": stacked("attn.c_proj.bias"),
    }  # fmt: skip
    block_params = {
        "mixer": mixer,
        "mixer_norm": {"gain": stacked("ln_1.weight"), "bias": stacked("ln_1.bias")},
        "ffn_norm": {"gain": stacked("ln_2.weight"), "bias": stacked("ln_2.bias")},
        "ffn": {
            "up": {"kernel": stacked("mlp.c_fc.weight"), "bias": stacked("mlp.c_fc.bias")},
            "down": {"kernel": stacked("mlp.c_proj.weight"), "bias": stacked("mlp.c_proj.bias")},
        },
    }
    params = {
        "embed": {"table": weights["transformer.wte.weight"], "positions": weights["transformer.wpe.weight"]},
        "norm": {"gain": weights["transformer.ln_f.weight"], "bias": weights["transformer.ln_f.bias"]},
        "stack": {"periods": {0: block_params}},
    }
    block = F(
        Block,
        mixer=F(Attention, heads=H, qkv_bias=True, out_bias=True),
        ffn=F(MLP, width=FFN, activation="gelu_tanh", bias=True),
        norm=LayerNorm,
    )
    stack, embed = F(Stack, pattern=(block,), depth=LAYERS), F(Embed, positions=64)
    got = our_logits(
        lambda rngs: LanguageModel(vocab=VOCAB, dim=D, stack=stack, norm=LayerNorm, embed=embed, rngs=rngs), params
    )
    want = their_logits(model)
    record_property("worst gpt2, weights by hand", float(np.abs(np.asarray(got) - np.asarray(want)).max()))
    np.testing.assert_allclose(got, want, atol=1e-4)
