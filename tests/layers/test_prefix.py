"""Prefix language models: what all tokens of a segment see, while training and decoding; positions in two channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import kernels
from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.rope2d import RoPE2D
from layers.stack import Stack
from tests.reference.random import random_module

F = functools.partial
B, T, H, K = 2, 100, 2, 8
SEGMENTS = np.stack([np.repeat([1, 2, 0], [60, 25, 15]), np.repeat([1, 2], [30, 70])])
PREFIX = np.random.default_rng(0).random((B, T)) < 0.3


def by_definition(q, k, v, window):
    """One query and one key at a time: same segment, and past or prefix, and in the window."""
    seen = np.zeros((B, T, T), bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                same = SEGMENTS[b, i] == SEGMENTS[b, j]
                seen[b, i, j] = same and (j <= i or PREFIX[b, j]) and (window is None or abs(i - j) < window)
    score = jnp.where(seen[:, None], 0.3 * jnp.einsum("bthk,bshk->bhts", q, k), -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(score, -1), v)


@pytest.mark.parametrize("window", [None, 20])
def test_the_mask_is_its_definition_in_value_and_gradient(window, monkeypatch):
    monkeypatch.setattr(kernels, "chunked_attention", functools.partial(kernels.chunked_attention, chunk=16))
    q, k, v, weight = (jax.random.normal(key, (B, T, H, K)) for key in jax.random.split(jax.random.key(0), 4))

    def gradients(attend):
        def total(qkv):
            y = attend(*qkv)
            return jnp.sum(y * weight), y

        return jax.jit(jax.value_and_grad(total, has_aux=True))((q, k, v))

    expected = gradients(functools.partial(by_definition, window=window))
    knobs = {
        "scale": 0.3,
        "causal": True,
        "window": window,
        "segments_BT": jnp.asarray(SEGMENTS),
        "prefix_BT": jnp.asarray(PREFIX),
    }
    for name in ("blocked", "chunked", "xla"):
        with kernels.choose("attention", name):
            got = gradients(lambda q, k, v: kernels.attention(q, k, v, **knobs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), got, expected)


def test_a_gpu_does_not_take_a_kernel_without_prefixes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    name, reason = kernels.pick_attention(q, None, None, None, None, jnp.ones((1, 64), bool))
    assert name == "blocked" and "prefix" in reason


def network(prompt, rope, window=None):
    block = F(Block, mixer=F(Attention, heads=2, rope=rope, window=window), ffn=F(GatedMLP, width=24), norm=RMSNorm)
    make = F(LanguageModel, vocab=50, dim=16, stack=F(Stack, pattern=(block,), depth=2), norm=RMSNorm, prompt=prompt)
    graph, params, _ = random_module(lambda rngs: make(rngs=rngs))
    return nnx.merge(graph, params)


@pytest.mark.parametrize(
    ("prompt", "rope", "window"),
    [("prefix", RoPE, None), ("prefix", RoPE, 4), ("blank", RoPE2D, None)],
    ids=["prefix", "window", "blank"],
)
def test_decoding_behind_a_prompt_equals_the_whole_row(prompt, rope, window):
    """Rows with prompts of different lengths, the padding of the shorter ones never seen."""
    model = network(prompt, rope, window)
    lengths, total = np.asarray([6, 3]), 9
    tokens = jax.random.randint(jax.random.key(1), (2, total), 0, 50)
    index = jnp.broadcast_to(jnp.arange(total), tokens.shape)
    ctx = Context.of(tokens, prefix_BT=index < lengths[:, None])
    if prompt == "blank":  # what follows the prompt fills a blank that is its last token
        blocks = jnp.maximum(index - lengths[:, None] + 1, 0)
        ctx = ctx.replace(positions_BT=jnp.minimum(index, lengths[:, None] - 1), blocks_BT=blocks)
    run = jax.jit(lambda tokens, ctx: model(tokens, ctx).hidden_BTD)
    whole, plain = (np.asarray(run(tokens, c)) for c in (ctx, ctx.replace(prefix_BT=jnp.zeros_like(ctx.prefix_BT))))
    assert np.abs(whole - plain)[:, 0].max() > 1e-3, "the first token sees the rest of the prompt"

    extend = jax.jit(lambda tokens, cache, lengths: model.extend(tokens, cache, lengths))
    hidden, cache = extend(tokens[:, :6], model.init_cache(2, total, jnp.float32), jnp.asarray(lengths))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :n], whole[row, :n], atol=1e-5)
    for step in range(3):
        following = jnp.asarray([[tokens[row, n + step]] for row, n in enumerate(lengths)])
        hidden, cache = extend(following, cache, jnp.ones(2, jnp.int32))
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(hidden[row, 0], whole[row, n + step], atol=1e-5)


def test_two_channels_shift_together_and_one_is_rope_on_half_the_head():
    rope = RoPE2D(K, base=100.0)
    q, k = (jax.random.normal(key, (1, 5, 1, K)) for key in jax.random.split(jax.random.key(0)))
    a, b = jnp.asarray([[0, 1, 2, 2, 2]]), jnp.asarray([[0, 0, 0, 1, 2]])

    def scores(shift_a, shift_b):
        return jnp.einsum("bthk,bshk->bts", rope(q, a + shift_a, b + shift_b), rope(k, a + shift_a, b + shift_b))

    @jax.jit
    def on_one_channel():
        return rope(q, a, jnp.zeros_like(b)), RoPE(K // 2, base=100.0)(q[..., : K // 2], a)

    scores = jax.jit(scores)
    np.testing.assert_allclose(scores(3, 7), scores(0, 0), atol=1e-5)
    got, half = (np.asarray(z) for z in on_one_channel())
    np.testing.assert_allclose(got[..., K // 2 :], np.asarray(q)[..., K // 2 :], atol=1e-6)
    np.testing.assert_allclose(got[..., : K // 2], half, atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="head_dim that 4 divides"):
        RoPE2D(6)
    with pytest.raises(ValueError, match=r"RoPE.layout='spiral'"):
        RoPE2D(8, layout="spiral")
    with pytest.raises(ValueError, match="blocks_BT"):
        jax.eval_shape(lambda: network("prefix", RoPE2D)(jnp.zeros((1, 4), jnp.int32), Context.of(jnp.zeros((1, 4)))))
    with pytest.raises(ValueError, match=r"LanguageModel.prompt='none'"):
        network("none", RoPE)
