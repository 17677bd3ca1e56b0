"""Chameleon's block, with its query-key norm, against transformers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.head_norm import HeadNorm
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.rope import RoPE
from maxlike.optimizers.groups import kind
from tests.reference.random import random_module

B, T, D, H, K, W = 2, 7, 16, 4, 4, 24


def test_chameleons_block_equals_transformers(record_property):
    torch = pytest.importorskip("torch")
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    config = chameleon.ChameleonConfig(
        hidden_size=D, intermediate_size=W, num_attention_heads=H, num_key_value_heads=H, num_hidden_layers=1,
        max_position_embeddings=32, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = chameleon.ChameleonSwinDecoderLayer(config, 0).eval()
    rngs = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(torch.from_numpy(rngs.normal(size=weight.shape, scale=0.3)) + ("norm.weight" in name))
    w = {name: weight.detach().numpy() for name, weight in theirs.named_parameters()}
    norm = functools.partial(RMSNorm, eps=1e-5)
    mixer = functools.partial(Attention, heads=H, rope=RoPE, qk_norm=functools.partial(HeadNorm, heads=H))
    ffn = functools.partial(GatedMLP, width=W)
    graph, params, _ = random_module(lambda rngs: Block(D, mixer=mixer, ffn=ffn, norm=norm, order="swin", rngs=rngs))
    split = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    attention = {ours: {"kernel": w[f"self_attn.{name}.weight"].T.reshape(D, H, K)} for ours, name in split.items()}
    for ours, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        attention[ours] = {"gain": w[f"self_attn.{name}.weight"], "bias": w[f"self_attn.{name}.bias"]}
    attention["out"] = {"kernel": w["self_attn.o_proj.weight"].T.reshape(H, K, D)}
    mapped = {
        "mixer": attention,
        "mixer_norm": {"gain": w["input_layernorm.weight"]},
        "ffn_norm": {"gain": w["post_attention_layernorm.weight"]},
        "ffn": {name: {"kernel": w[f"mlp.{name}_proj.weight"].T} for name in ("gate", "up", "down")},
    }
    assert {k: v.shape for k, v in _flat(mapped).items()} == {k: v.shape for k, v in _flat(params).items()}
    x = rngs.normal(size=(B, T, D)).astype(np.float32)
    positions = torch.arange(T)[None].expand(B, T)
    mask = torch.triu(torch.full((T, T), torch.finfo(torch.float32).min), 1)[None, None]
    angles = chameleon.ChameleonRotaryEmbedding(config)(torch.from_numpy(x), positions)
    with torch.no_grad():
        out = theirs(torch.from_numpy(x), attention_mask=mask, position_ids=positions, position_embeddings=angles)
    expected = (out[0] if isinstance(out, tuple) else out).numpy()
    got, _ = nnx.merge(graph, mapped)(jnp.asarray(x), Context.of(x[..., 0]))
    record_property("worst Chameleon block", float(np.abs(np.asarray(got) - np.asarray(expected)).max()))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def _flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, child in tree.items() for k, v in _flat(child, f"{path}/{name}").items()}


def test_its_parameters_do_not_decay_and_wrong_heads_are_refused():
    assert kind("gain", ("layers", "heads", "norm")) == "vector"
    norm = HeadNorm(K, heads=H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"HeadNorm\.heads=4 does not fit 2 heads"):
        norm(jnp.zeros((B, T, 2, K)))
    with pytest.raises(ValueError, match=r"HeadNorm\.heads=0"):
        HeadNorm(K, heads=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"HeadNorm\.eps=0"):
        HeadNorm(K, heads=1, eps=0, rngs=nnx.Rngs(0))
