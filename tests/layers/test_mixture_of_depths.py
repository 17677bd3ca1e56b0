"""Mixture of depths against a loop over one row, packed documents, and its decoding with an auxiliary router."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.active import active_parameters
from layers.attention import Attention
from layers.auxiliary_router import AuxiliaryRouter
from layers.balance import SignBias
from layers.block import Block
from layers.context import Context
from layers.experts import Experts
from layers.language_model import LanguageModel
from layers.mamba2 import Mamba2
from layers.mixture_of_depths import MixtureOfDepths
from layers.mla import MLA
from layers.mlp import GatedMLP
from layers.modality_moe import ModalityMoE
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.relative_attention import RelativeAttention
from layers.rope import RoPE
from layers.routers import TopK
from layers.shortcut_block import ShortcutBlock
from layers.stack import Stack
from tests.reference.moma import mixture_of_depths
from tests.reference.random import random_module

B, T, D, V = 2, 16, 8, 11
F = functools.partial
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
ATTENTION = F(Attention, heads=2, kv_heads=1, rope=RoPE)
BLOCK = F(Block, mixer=ATTENTION, ffn=F(GatedMLP, width=12), norm=RMSNorm)
SHORTCUT = F(ShortcutBlock, ffn=F(GatedMLP, width=12), moe=F(GatedMLP, width=12), norm=RMSNorm)
PLAIN = Context.of(jnp.zeros((B, T)))


@functools.cache
def layer(block=BLOCK, **knobs):
    graph, params, _ = random_module(lambda rngs: MixtureOfDepths(D, block=block, **knobs, rngs=rngs))
    return graph, params, jax.jit(lambda params, x_BTD, ctx: nnx.merge(graph, params)(x_BTD, ctx))


def test_equals_a_loop_over_the_row():
    graph, params, call = layer(capacity=0.4)
    got, aux = call(params, X, PLAIN)

    @jax.jit
    def run(x_KD, positions_K):
        return nnx.merge(graph, params).block(x_KD[None], Context(positions_K[None], None))[0][0]

    for row in range(B):
        expected, kept = mixture_of_depths(X[row], np.asarray(params["router"]), 0.4, lambda *x: np.asarray(run(*x)))
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
        untouched = np.setdiff1d(np.arange(T), kept)
        np.testing.assert_array_equal(got[row, untouched], X[row, untouched])
    assert float(aux["depth/kept"]) == pytest.approx(6 / 16) and float(aux["depth/dropped"]) == 0


def test_capacity_one_runs_every_token_through_the_block():
    graph, params, call = layer(capacity=1.0)
    got, _ = call(params, X, PLAIN)
    y, _ = jax.jit(lambda params, x_BTD: nnx.merge(graph, params).block(x_BTD, PLAIN))(params, X)
    weight = 1 / (1 + np.exp(-X @ params["router"]))
    np.testing.assert_allclose(got, X + weight[..., None] * (y - X), atol=1e-5)


def test_packed_documents_and_padding_do_not_mix():
    _, params, call = layer(capacity=0.5)
    segments = jnp.broadcast_to(
        jnp.repeat(jnp.asarray([1, 2, 0]), jnp.asarray([6, 7, 3]), total_repeat_length=T), (B, T)
    )
    ctx = PLAIN.replace(segments_BT=segments)
    plain, aux = call(params, X, ctx)
    assert float(aux["depth/kept"]) == pytest.approx(6 / 13)  # floor(0.5 * 13) of the real ones
    padded, _ = call(params, np.where(np.asarray(segments)[..., None] > 0, X, 1e3), ctx)
    np.testing.assert_array_equal(plain[:, :13], padded[:, :13])
    # Turning values of the first document without changing any score leaves the second one as it is.
    w = np.asarray(params["router"])
    turn = np.random.default_rng(1).normal(size=(B, 6, D)).astype(np.float32)
    turn -= (turn @ w)[..., None] * w / (w @ w)
    other = X.copy()
    other[:, :6] += turn
    changed, _ = call(params, other, ctx)
    np.testing.assert_allclose(changed[:, 6:13], plain[:, 6:13], atol=1e-6)
    assert np.abs(changed - plain)[:, :6].max() > 0.1


def test_batch_scope_keeps_the_best_of_all_rows():
    _, params, call = layer(capacity=0.25, scope="batch", row_bound=4.0)
    x = X + np.asarray([[[1.0]], [[0.0]]]) * np.asarray(params["router"]) * 20  # the first row scores above the second
    got, aux = call(params, x, PLAIN)
    assert float(aux["depth/kept"]) == pytest.approx(0.25) and float(aux["depth/dropped"]) == 0
    np.testing.assert_array_equal(got[1], x[1].astype(np.float32))
    _, _, bounded = layer(capacity=0.25, scope="batch", row_bound=1.5)
    _, aux = bounded(params, x, PLAIN)
    assert float(aux["depth/dropped"]) == pytest.approx(2 / 8)  # room for 6 of the row's 8


AUXILIARY = {"auxiliary": AuxiliaryRouter, "evaluation": "auxiliary"}


def test_auxiliary_routing_is_causal_and_top_k_is_not():
    _, params, call = layer(capacity=0.5, **AUXILIARY)
    changed = X.copy()
    changed[:, 9:] *= -2
    outputs = [np.asarray(call(params, x, PLAIN)[0]) for x in (X, changed)]
    np.testing.assert_allclose(outputs[0][:, :9], outputs[1][:, :9], atol=1e-6)
    leaking = [np.asarray(call(params, x, PLAIN.replace(train=True))[0]) for x in (X, changed)]
    assert np.abs(leaking[0] - leaking[1])[:, :9].max() > 0.1


def model(mod, ffn, **knobs):
    """Mixture of depths below a plain block, over two modalities, as MoDE is built."""
    block = F(Block, mixer=ATTENTION, ffn=ffn, norm=RMSNorm, order="swin")
    stack = F(Stack, pattern=(F(MixtureOfDepths, block=block, **mod), block), depth=4, scan=True)
    return F(LanguageModel, vocab=V, dim=D, stack=stack, norm=RMSNorm, modality_starts=(7,), **knobs)


def test_cached_decoding_equals_the_whole_row_and_keeps_only_kept_tokens():
    """Chunks, single tokens and ragged rows of a whole MoDE network, routed by auxiliary routers."""
    ffn = F(ModalityMoE, width=12, groups=(2, 3), **AUXILIARY)
    build = model({"capacity": 0.5, **AUXILIARY}, ffn)
    graph, params, _ = random_module(lambda rngs: build(rngs=rngs), std=0.5)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, T)), jnp.int32)
    network = nnx.merge(graph, params)
    whole = jax.jit(lambda p: nnx.merge(graph, p)(tokens, PLAIN))(params)
    kept = np.asarray(whole.aux["depth/kept"])
    assert kept.shape == (2,) and np.all(kept > 0.1) and np.all(kept < 0.9)
    extend = jax.jit(lambda p, tokens, cache, lengths: nnx.merge(graph, p).extend(tokens, cache, lengths))
    cache, at = network.init_cache(B, T, jnp.float32), np.zeros(B, int)
    for lengths in [(5, 3), (0, 5), (1, 1), (5, 4), (5, 3)]:
        chunk = np.zeros((B, 5), int)
        for row, n in enumerate(lengths):
            chunk[row, :n] = tokens[row, at[row] : at[row] + n]
        hidden, cache = extend(params, jnp.asarray(chunk), cache, jnp.asarray(lengths))
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(hidden[row, :n], whole.hidden_BTD[row, at[row] : at[row] + n], atol=2e-5)
        at += lengths
    assert at.tolist() == [T, T]
    depth = cache["stack"]["periods"][0]
    np.testing.assert_allclose(np.asarray(depth["kept_B"]).mean(1) / T, kept)
    written = np.abs(np.asarray(depth["block"]["k"])).sum((-3, -1)) > 0  # of [repeats, B, G, S, K]
    np.testing.assert_array_equal(written.sum(-1), depth["kept_B"])
    assert np.all(written[..., :-1] >= written[..., 1:]), "the cache has gaps"


MIXERS = {
    "mla": F(MLA, heads=2, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=3, rope=RoPE),
    "mamba2": F(Mamba2, heads=4, head_dim=4, state=8, chunk=8),
}


@pytest.mark.parametrize("name", MIXERS)
def test_other_caches_skip_tokens_too(name):
    graph, params, call = layer(block=F(BLOCK, mixer=MIXERS[name]), capacity=0.5, **AUXILIARY)
    whole, aux = call(params, X, PLAIN)
    assert 0.2 < float(aux["depth/kept"]) < 0.8
    extend = jax.jit(lambda p, x, cache, ctx: nnx.merge(graph, p).extend(x, cache, ctx))
    cache, out = nnx.merge(graph, params).init_cache(B, T, jnp.float32), []
    for t in range(0, T, 4):
        ctx = Context(jnp.broadcast_to(t + jnp.arange(4), (B, 4)), None, jnp.full(B, 4))
        y, cache = extend(params, X[:, t : t + 4], cache, ctx)
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), whole, atol=1e-5)


def test_gradients_reach_the_router_and_skip_dropped_tokens():
    graph, params, _ = layer(capacity=0.25)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(nnx.merge(graph, p)(jnp.asarray(X), PLAIN)[0]))))(params)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_active_parameters_do_not_count_what_is_no_parameter():
    mixture = F(MoE, router=F(TopK, top_k=1, bias=SignBias), experts=F(Experts, count=2, width=4))
    block = F(BLOCK, ffn=mixture)
    whole = jax.eval_shape(lambda: MixtureOfDepths(D, block=block, capacity=1.0, rngs=nnx.Rngs(0)))
    assert active_parameters(whole) == active_parameters(jax.eval_shape(lambda: block(D, rngs=nnx.Rngs(0)))) + D


def test_flops_are_the_blocks_share():
    block = jax.eval_shape(lambda: BLOCK(D, rngs=nnx.Rngs(0)))
    mod = jax.eval_shape(lambda: MixtureOfDepths(D, block=BLOCK, capacity=0.25, rngs=nnx.Rngs(0)))
    assert mod.flops_per_token(64) == pytest.approx(0.25 * block.flops_per_token(16) + 2 * D)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"capacity": 0.0}, r"MixtureOfDepths\.capacity=0.0 is outside \(0, 1\]"),
        ({"capacity": 1.5}, r"capacity=1.5"),
        ({"scope": "shard"}, r"scope='shard'"),
        ({"row_bound": 2.0}, r"row_bound=2.0 must be at least 1, and 1.0 where"),
        ({"evaluation": "auxiliary"}, r"evaluation='auxiliary' needs MixtureOfDepths\.auxiliary"),
        ({"block": F(BLOCK, mixer=F(ATTENTION, window=4))}, r"Attention\.window=4"),
        ({"block": F(SHORTCUT, mixer=F(ATTENTION, window=4))}, r"Attention\.window=4"),
        ({"block": F(BLOCK, mixer=F(RelativeAttention, heads=2))}, r"block has RelativeAttention"),
    ],
)
def test_refused_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: MixtureOfDepths(D, **{"block": BLOCK} | knobs, rngs=nnx.Rngs(0)))


def test_refused_calls():
    graph, params, call = layer(capacity=0.25)
    plain = nnx.merge(graph, params)
    with pytest.raises(ValueError, match=r"capacity=0.25 keeps none of a row of 3 tokens"):
        call(params, X[:, :3], Context.of(jnp.zeros((B, 3))))
    with pytest.raises(ValueError, match=r"MixtureOfDepths\.auxiliary is None"):
        plain.init_cache(B, T, jnp.float32)
    with pytest.raises(ValueError, match="no prefix"):
        call(params, X, PLAIN.replace(prefix_BT=jnp.ones((B, T), bool)))
