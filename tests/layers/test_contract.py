"""What every mixer and feed-forward owes, whatever it computes.

A new part joins by one line in MIXERS or FEED_FORWARDS, and by its name in a flag below them where it owes less.
What it owes inside a stack is in test_contract_stack.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers import axes
from layers.attention import Attention
from layers.attention_gate import AttentionGate
from layers.auxiliary_router import AuxiliaryRouter
from layers.balance import SignBias
from layers.context import Context
from layers.delta_net import DeltaNet
from layers.dispatch import Capacity
from layers.dual_chunk import DualChunk
from layers.expert_choice import ExpertChoice
from layers.experts import Experts
from layers.gated_delta_net import GatedDeltaNet
from layers.gated_linear_attention import GatedLinearAttention
from layers.linear_attention import LightningAttention
from layers.lrpe import LRPE
from layers.mamba2 import Mamba2
from layers.mla import MLA
from layers.mlp import MLP, GatedMLP
from layers.modality_moe import ModalityMoE
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.relative_attention import RelativeAttention, RelativeBias
from layers.retention import Retention
from layers.rope import RoPE
from layers.routers import GroupLimit, TopK
from layers.zero_experts import ZeroExperts
from tests.reference.random import random_module

D, B, T = 16, 3, 24
F = functools.partial


class EveryOtherIsAnImage(ModalityMoE):
    """With the modality ids that a network would give."""

    def __call__(self, x_BTD, ctx):
        return super().__call__(x_BTD, ctx.replace(modality_BT=ctx.positions_BT % 2))


LATENT = {"heads": 4, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 3, "rope": RoPE}
VALUE_GATE = F(AttentionGate, position="g2", granularity="headwise")
CHUNKS = {"chunk": 5, "local": 3, "trained_length": 8}
MIXERS = {
    "multi_head": F(Attention, heads=4, rope=RoPE),
    "encoder": F(Attention, heads=4, kv_heads=2, causal=False, window=5, rope=RoPE),
    "grouped_query": F(Attention, heads=4, kv_heads=2, rope=RoPE, qk_norm=RMSNorm, qkv_bias=True, out_bias=True),
    "sliding_window": F(Attention, heads=4, kv_heads=2, window=5, rope=RoPE),
    "capped_window_with_sinks": F(Attention, heads=4, kv_heads=2, window=9, soft_cap=2.0, sinks=True, scale=0.3),
    "capped_with_sinks": F(Attention, heads=4, kv_heads=1, head_dim=8, soft_cap=2.0, sinks=True),
    "gated": F(Attention, heads=4, kv_heads=2, rope=RoPE, qk_norm=RMSNorm, gate=AttentionGate),
    "gated_values": F(Attention, heads=4, kv_heads=2, rope=RoPE, window=5, gate=VALUE_GATE),
    "mla": F(MLA, **LATENT, kv_heads=2, gate=AttentionGate),
    "mla_with_query_rank": F(MLA, **LATENT, query_rank=8, latent_norm=RMSNorm, scale_correction=True),
    "dual_chunk": F(DualChunk, **CHUNKS, heads=4, kv_heads=2, rope=RoPE, logit_scale="once", gate=AttentionGate),
    "mamba2": F(Mamba2, heads=4, head_dim=8, state=8, groups=2, chunk=8),
    "mamba2_kv_heads": F(Mamba2, expand=1, head_dim=4, state=4, kv_heads=2, chunk=8),
    "gated_delta_net": F(GatedDeltaNet, heads=4, key_heads=2, key_dim=8, value_dim=4, chunk=8),
    "lightning": F(LightningAttention, heads=4, layers=1, lrpe=LRPE, chunk=8),
    "lightning_in_depth": F(LightningAttention, heads=4, layers=3, decay="paper_linear", chunk=8),
    "retention": F(Retention, heads=4, chunk=8),
    "gated_linear_attention": F(GatedLinearAttention, heads=2, rank=4, chunk=8),
    "delta_net": F(DeltaNet, heads=4, chunk=16),
    "relative_bias": F(
        RelativeAttention, heads=4, bias=F(RelativeBias, heads=4, buckets=8, max_distance=9, bidirectional=False)
    ),
}
FEED_FORWARDS = {
    "modality_moe_1t1i": F(EveryOtherIsAnImage, groups=(1, 1), width=24, capacity_bound=(0.5, 0.5)),
    "modality_moe_2t3i": F(
        EveryOtherIsAnImage, groups=(2, 3), width=24, routing_scope="batch", router_noise="gumbel_sigmoid"
    ),
    "modality_moe_foretold": F(
        EveryOtherIsAnImage, groups=(2, 3), width=24, auxiliary=AuxiliaryRouter, evaluation="auxiliary"
    ),
    "expert_choice": F(ExpertChoice, experts=F(Experts, count=4, width=24), capacity_factor=1.5, allow_noncausal=True),
    "swiglu": F(GatedMLP, width=24),
    "geglu": F(GatedMLP, width=24, activation="gelu", bias=True),
    "relu2": F(MLP, width=24, activation="relu2", bias=True),
    "moe_dropless": F(
        MoE,
        router=F(TopK, top_k=2),
        experts=F(Experts, count=4, width=24),
        shared=F(GatedMLP, width=24),
        shared_gate=True,
    ),
    "moe_sigmoid_limited_zero": F(
        MoE,
        router=F(TopK, top_k=3, score="sigmoid", bias=SignBias, limit=F(GroupLimit, groups=3, top_groups=2)),
        experts=F(Experts, count=4, width=24),
        zero_experts=F(ZeroExperts, identity=1, constant=1),
    ),
    "moe_capacity": F(
        MoE,
        router=F(TopK, top_k=2),
        experts=F(Experts, count=4, width=24),
        dispatch=F(Capacity, factor=0.75, evaluation_factor=0.75, minimum=1),
    ),
}
PARTS = MIXERS | FEED_FORWARDS
# What a token gets depends on later ones, so there is no cache.
READS_FUTURE = ("encoder", "modality_moe_2t3i", "expert_choice")
# Experts take or drop tokens: some get nothing, and where x is rounded the last ones taken are others.
SKIPS_TOKENS = ("modality_moe_2t3i", "modality_moe_foretold", "expert_choice", "moe_capacity")
# XLA counts one turn of a loop whose length depends on the tokens (test_moe.py counts these at full capacity), and the
# places of experts that no token takes.
OTHERWISE_COUNTED = ("moe_dropless", "moe_sigmoid_limited_zero", "moe_capacity")
OTHERWISE_COUNTED += ("modality_moe_2t3i", "modality_moe_foretold")
mixer = pytest.mark.parametrize("name", MIXERS)
part = pytest.mark.parametrize("name", PARTS)
decoder = pytest.mark.parametrize("name", [name for name in MIXERS if name not in READS_FUTURE])
# The rest is replicated.
SHARDED = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp", "experts": "expert"}


class Built:
    """A part with large random parameters (biases and sinks too), its compiled call and its compiled extend."""

    def __init__(self, name: str):
        graph, self.params, self.axes = random_module(lambda rngs: PARTS[name](D, rngs=rngs))
        self.part = nnx.merge(graph, self.params)
        self.pure = lambda params, x_BTD, ctx: nnx.merge(graph, params)(x_BTD, ctx)[0]
        self.call = jax.jit(self.pure)
        self.extend = jax.jit(lambda params, x_BTD, cache, ctx: nnx.merge(graph, params).extend(x_BTD, cache, ctx))


built = functools.cache(Built)


def inputs(seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, T, D))


def rows(batch: int, length: int = T) -> Context:
    """Unpacked rows in the second layer of a network."""
    return Context.of(jnp.zeros((batch, length), jnp.int32), layer=jnp.int32(1))


def context(segments_BT=None, positions_BT=None) -> Context:
    plain = rows(B)
    segments_BT = jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT
    return plain.replace(
        segments_BT=segments_BT, positions_BT=plain.positions_BT if positions_BT is None else positions_BT
    )


@part
def test_shape_and_dtype_follow_the_input(name):
    b, x_BTD = built(name), inputs()
    full = b.call(b.params, x_BTD, context())
    low = b.call(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), b.params), x_BTD.astype(jnp.bfloat16), context())
    assert full.shape == low.shape == x_BTD.shape
    assert full.dtype == jnp.float32 and low.dtype == jnp.bfloat16
    close = np.abs(low.astype(jnp.float32) - full) <= 0.06 * jnp.abs(full).max()
    assert np.mean(close) >= (0.9 if name in SKIPS_TOKENS else 1.0)


@pytest.mark.parametrize("name", [name for name in PARTS if name not in READS_FUTURE])
def test_no_token_depends_on_a_later_one(name):
    b, x_BTD = built(name), inputs()
    jacobian = jax.jit(jax.jacrev(lambda x_TD: b.pure(b.params, x_TD[None], rows(1))[0].sum(-1)))
    influence_TS = np.abs(jacobian(x_BTD[0])).sum(-1)
    assert np.all(np.triu(influence_TS, 1) == 0)
    assert np.mean(np.diag(influence_TS) > 0) >= (0.5 if name in SKIPS_TOKENS else 1.0)


@pytest.mark.parametrize("name", READS_FUTURE)
def test_what_reads_the_future_refuses_a_cache(name):
    b, x_BTD = built(name), inputs()
    late = b.call(b.params, x_BTD.at[:, -4:].multiply(3.0), context())
    assert np.any(late[:, :-4] != b.call(b.params, x_BTD, context())[:, :-4])
    with pytest.raises(ValueError, match="|".join(("causal", "decode"))):
        b.part.init_cache(B, T, jnp.float32) if name in MIXERS else b.part.check_decoding()


@mixer
def test_packed_documents_equal_separate_ones(name):
    b, x_BTD = built(name), inputs()
    cut = 10
    segments_BT = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, 1, 2), (B, T))
    positions_BT = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, jnp.arange(T), jnp.arange(T) - cut), (B, T))
    packed = b.call(b.params, x_BTD, context(segments_BT, positions_BT))
    # Each document alone at the left of a row whose rest is padding: one compiled program for all three calls.
    second = jnp.roll(x_BTD, -cut, axis=1)
    for x, length, got in ((x_BTD, cut, packed[:, :cut]), (second, T - cut, packed[:, cut:])):
        alone = b.call(b.params, x, context(jnp.broadcast_to(jnp.where(jnp.arange(T) < length, 1, 0), (B, T))))
        np.testing.assert_allclose(got, alone[:, :length], atol=2e-6)


@part
def test_padding_does_not_leak(name):
    b, x_BTD = built(name), inputs()
    real_T = jnp.arange(T) < 15
    ctx = context(jnp.broadcast_to(real_T.astype(jnp.int32), (B, T)))
    clean = b.call(b.params, x_BTD, ctx)
    dirty = b.call(b.params, jnp.where(real_T[:, None], x_BTD, 100.0), ctx)
    np.testing.assert_array_equal(clean[:, :15], dirty[:, :15])
    assert np.isfinite(np.asarray(dirty)).all()


def decode(b: Built, x_BTD, chunks, cache, starts_B):
    """Feeds x chunk by chunk; returns the outputs of all tokens."""
    out, at = [], 0
    for size in chunks:
        positions_BT = starts_B[:, None] + at + jnp.arange(size)
        ctx = Context(positions_BT, None, lengths_B=jnp.full(B, size), layer=jnp.int32(1))
        y, cache = b.extend(b.params, x_BTD[:, at : at + size], cache, ctx)
        out.append(y)
        at += size
    return jnp.concatenate(out, 1)


@decoder
@pytest.mark.parametrize("chunks", [(T,), (1, 7, 16), (1,) * T], ids=["prefill", "chunks", "steps"])
def test_decoding_equals_the_whole_row(name, chunks):
    b, x_BTD = built(name), inputs()
    whole = b.call(b.params, x_BTD, context())
    got = decode(b, x_BTD, chunks, b.part.init_cache(B, T, jnp.float32), jnp.zeros(B, jnp.int32))
    np.testing.assert_allclose(got, whole, atol=1e-5)


@decoder
def test_ragged_rows_equal_each_row_alone(name):
    b, x_BTD = built(name), inputs()
    whole = b.call(b.params, x_BTD, context())
    # Chunks of at most 7 tokens with a different number of real ones in each row; padding is huge, so a leak shows.
    plan_CB = [(7, 3, 0), (2, 7, 7), (7, 7, 1), (0, 5, 7)]
    at_B, cache = np.zeros(B, int), b.part.init_cache(B, T, jnp.float32)
    for lengths_B in plan_CB:
        x = np.full((B, 7, D), 50.0, np.float32)
        for row, n in enumerate(lengths_B):
            x[row, :n] = x_BTD[row, at_B[row] : at_B[row] + n]
        ctx = Context(jnp.asarray(at_B[:, None] + np.arange(7)), None, jnp.asarray(lengths_B), layer=jnp.int32(1))
        y, cache = b.extend(b.params, jnp.asarray(x), cache, ctx)
        for row, n in enumerate(lengths_B):
            np.testing.assert_allclose(y[row, :n], whole[row, at_B[row] : at_B[row] + n], atol=1e-5)
        at_B += np.asarray(lengths_B)
    assert np.isfinite(np.asarray(y)).all()


@part
def test_sharded_equals_one_device(name):
    b, x_BTD = built(name), inputs()
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "expert"), axis_types=(AxisType.Auto,) * 3)

    def spec(names, shape):
        entries = [SHARDED.get(axis) for axis in names]
        return PartitionSpec(*(a if a and n % 2 == 0 else None for a, n in zip(entries, shape)))

    leaves = jax.tree.leaves(b.params)
    placed = [jax.device_put(x, NamedSharding(mesh, spec(names, x.shape))) for x, names in zip(leaves, b.axes)]
    x_sharded = jax.device_put(x_BTD[:2], NamedSharding(mesh, PartitionSpec("fsdp")))
    ctx = rows(2)
    got = b.call(jax.tree.unflatten(jax.tree.structure(b.params), placed), x_sharded, ctx)
    np.testing.assert_allclose(got, b.call(b.params, x_BTD[:2], ctx), atol=1e-5)
    assert any(not x.sharding.is_fully_replicated for x in placed)


@part
def test_axes_name_every_dimension_of_every_parameter(name):
    b = built(name)
    for names, leaf in zip(b.axes, jax.tree.leaves(b.params), strict=True):
        assert len(names) == leaf.ndim
        assert set(names) <= set(axes.PARAMETER_AXES)
        assert len(set(names)) == len(names), "a mesh axis would be used twice"


@pytest.mark.parametrize("name", [name for name in PARTS if name not in OTHERWISE_COUNTED])
def test_flops_are_what_xla_counts(name):
    # Wide and short enough for matrix products to dominate, one block of queries so that nothing is skipped.
    wide, length = 128, 32
    graph, params, _ = random_module(lambda rngs: PARTS[name](wide, rngs=rngs))

    def call(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD, rows(1, length))[0]

    x_BTD = jax.ShapeDtypeStruct((1, length, wide), jnp.float32)
    counted = jax.jit(call).lower(params, x_BTD).compile().cost_analysis()["flops"] / length
    stated = nnx.merge(graph, params).flops_per_token(length)
    assert stated <= counted * 1.02 and counted < stated * 1.35  # XLA also counts the invisible half, norms and softmax
