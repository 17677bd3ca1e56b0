"""Mixtures of experts against a dense loop over all experts; capacity against bookkeeping; telemetry; refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.active import active_parameters
from layers.attention import Attention
from layers.balance import BudgetBias, LoadBalance, SignBias
from layers.block import Block
from layers.context import Context
from layers.dispatch import Capacity
from layers.experts import Experts
from layers.mlp import GatedMLP
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.routers import GroupLimit, TopK
from layers.stack import Stack
from layers.zero_experts import ZeroExperts
from tests.reference import moe as reference
from tests.reference.random import random_module

F = functools.partial
D, E, WIDTH, B, T = 8, 6, 5, 2, 11
EXPERTS = F(Experts, count=E, width=WIDTH)
PLAIN = Context.of(jnp.zeros((B, T)))


def made(std=0.4, **knobs):
    graph, params, _ = random_module(lambda rngs: MoE(D, experts=EXPERTS, **knobs, rngs=rngs), std=std)
    return graph, jax.tree.map(jnp.asarray, params)


def call(graph):
    return jax.jit(lambda params, x_BTD, ctx: nnx.merge(graph, params)(x_BTD, ctx))


def inputs(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, T, D))


def dense(params, x_TD, **knobs):
    """Experts with weights alone, by the reference."""
    weight_TE = reference.weights(x_TD, params["router"]["kernel"], **knobs)
    y_TED = reference.experts(x_TD, *(params["experts"][name] for name in ("gate", "up", "down")))
    return jnp.einsum("te,ted->td", weight_TE[:, :E], y_TED), weight_TE


ROUTED = {
    "softmax": {"top_k": 2},
    "softmax over the chosen": {"top_k": 2, "norm_topk": True, "scale": 2.5},
    "sigmoid": {"top_k": 3, "score": "sigmoid", "norm_topk": True},
    "all experts": {"top_k": E},
}


@pytest.mark.parametrize("name", ROUTED)
def test_values_and_gradients_equal_the_dense_loop(name):
    graph, params = made(router=F(TopK, **ROUTED[name]))
    x_BTD, g_BTD = inputs(), inputs(2)

    def ours(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD, PLAIN)[0]

    def theirs(params, x_BTD):
        return dense(params, x_BTD.reshape(-1, D), **ROUTED[name])[0].reshape(x_BTD.shape)

    def both(f, params, x_BTD):
        y, pull = jax.vjp(f, params, x_BTD)
        return y, pull(g_BTD)

    got, want = jax.jit(lambda *x: (both(ours, *x), both(theirs, *x)))(params, x_BTD)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))


def test_every_part_together_equals_the_dense_loop():
    """Selection bias, limited groups, zero experts of each kind, a gated shared feed-forward."""
    router = F(TopK, top_k=4, score="sigmoid", bias=SignBias, limit=F(GroupLimit, groups=3, top_groups=2))
    zero = F(ZeroExperts, identity=1, zero=1, constant=1)
    graph, params = made(router=router, zero_experts=zero, shared=F(GatedMLP, width=4), shared_gate=True)
    params["router"]["bias"] *= 0.2  # small enough to leave every expert some tokens
    x_TD = np.asarray(inputs()).reshape(-1, D)

    @jax.jit
    def whole(params, x_TD):
        y_TD, weight_TE = dense(
            params, x_TD, top_k=4, score="sigmoid", norm_topk=True, bias_E=params["router"]["bias"], limit=(3, 2, 2)
        )
        a_T = jax.nn.sigmoid(x_TD @ params["zero_experts"]["mix"][0])[:, None]
        constant_TD = a_T * x_TD + (1 - a_T) * params["zero_experts"]["vector"][0]
        y_TD += weight_TE[:, E, None] * x_TD + weight_TE[:, E + 2, None] * constant_TD
        mlp = {name: params["shared"][name]["kernel"] for name in ("gate", "up", "down")}
        shared_TD = (jax.nn.silu(x_TD @ mlp["gate"]) * (x_TD @ mlp["up"])) @ mlp["down"]
        return y_TD + jax.nn.sigmoid(x_TD @ params["shared_gate"])[:, None] * shared_TD, weight_TE

    y_TD, weight_TE = (np.asarray(z) for z in whole(params, x_TD))
    assert (weight_TE[:, E:] > 0).any(0).all(), "an expert without a token tests nothing"
    got, aux = call(graph)(params, x_TD.reshape(B, T, D), PLAIN)
    np.testing.assert_allclose(np.reshape(got, (-1, D)), y_TD, atol=2e-5)
    visited_T = (weight_TE[:, :E] > 0).sum(1)
    np.testing.assert_allclose(aux["ffn_experts"], visited_T.mean(), rtol=1e-6)
    np.testing.assert_allclose(aux["ffn_experts_std"], visited_T.std(), rtol=1e-5)
    np.testing.assert_allclose(aux["bias"], np.abs(params["router"]["bias"]).max())
    rest = 2 * D * (E + 3) + 4 * D + 6 * D * 4 + 2 * D
    np.testing.assert_allclose(aux["flops_per_token"], rest + visited_T.mean() * 6 * D * WIDTH, rtol=1e-6)


def test_only_identity_experts_return_their_weight_times_the_input():
    graph, params = made(router=F(TopK, top_k=2, scale=3.0), zero_experts=F(ZeroExperts, identity=2))
    params["router"]["kernel"] = jnp.zeros((D, E + 2))  # equal probabilities: the bias decides

    @jax.jit
    def both(params, x_BTD):
        moe = nnx.merge(graph, params)
        routing = moe.router(x_BTD, PLAIN)
        index_BTJ = jnp.full((B, T, 2), jnp.array([0, 1]))
        return routing.index_BTJ, moe.zero_experts(x_BTD, index_BTJ, routing.weight_BTJ)

    index_BTJ, got = both(params, inputs())
    np.testing.assert_array_equal(index_BTJ, np.broadcast_to([0, 1], (B, T, 2)))
    np.testing.assert_allclose(got, 3.0 * 2 / (E + 2) * np.asarray(inputs()), rtol=1e-5)


@pytest.mark.parametrize("priority", ["position", "probability"])
def test_capacity_serves_as_bookkeeping_says(priority):
    capacity = F(Capacity, factor=0.8, minimum=1, priority=priority)
    graph, params = made(router=F(TopK, top_k=2), dispatch=capacity)
    x_BTD = inputs()
    real_BT = np.arange(T)[None] < np.array([T, 8])[:, None]
    ctx = PLAIN.replace(segments_BT=jnp.asarray(real_BT, jnp.int32), train=True)

    @jax.jit
    def parts(params, x_BTD):
        moe = nnx.merge(graph, params)
        routing = moe.router(x_BTD, ctx)
        y_NED = reference.experts(x_BTD.reshape(-1, D), *(params["experts"][name] for name in ("gate", "up", "down")))
        return moe(x_BTD, ctx), routing.index_BTJ, routing.weight_BTJ, y_NED.reshape(B, T, E, D)

    (got, aux), index_BTJ, weight_BTJ, y_BTED = jax.tree.map(np.asarray, parts(params, x_BTD))
    C = math.ceil(0.8 * T * 2 / E)
    kept = 0
    for b in range(B):
        order = [t for t in range(T) if real_BT[b, t]]
        if priority == "probability":
            order.sort(key=lambda t: -float(weight_BTJ[b, t, 0]))
        pairs = reference.served(index_BTJ[b], E, C, order)
        kept += len(pairs)
        want_TD = np.zeros((T, D), np.float32)
        for t, j in pairs:
            want_TD[t] += weight_BTJ[b, t, j] * y_BTED[b, t, index_BTJ[b, t, j]]
        np.testing.assert_allclose(got[b], want_TD, atol=1e-5)
    assert 0 < kept < 2 * (T + 8)
    np.testing.assert_allclose(aux["dropped"], 1 - kept / (2 * (T + 8)), rtol=1e-5)


def test_capacity_drops_nothing_outside_training_unless_told():
    parts = [made(router=F(TopK, top_k=2), dispatch=F(Capacity, factor=0.5, minimum=1, evaluation_factor=factor))
             for factor in (None, 0.5)]  # fmt: skip
    dropless, _ = made(router=F(TopK, top_k=2))
    x_BTD, params = inputs(), parts[0][1]
    whole = call(dropless)(params, x_BTD, PLAIN)[0]
    quiet, told = (functools.partial(call(graph), params, x_BTD) for graph, _ in parts)
    np.testing.assert_array_equal(quiet(PLAIN)[0], whole)
    assert told(PLAIN)[1]["dropped"] > 0 and quiet(PLAIN.replace(train=True))[1]["dropped"] > 0
    decoding = PLAIN.replace(lengths_B=jnp.full(B, T))
    np.testing.assert_array_equal(told(decoding)[0], whole)


def test_ample_capacity_equals_dropless_in_values_and_gradients():
    ample, params = made(router=F(TopK, top_k=2), dispatch=F(Capacity, factor=float(E)))
    dropless, _ = made(router=F(TopK, top_k=2))
    x_BTD, ctx = inputs(), PLAIN.replace(train=True)

    def gradients(graph):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p)(x, ctx)[0])), (0, 1)))(params, x_BTD)

    for a, b in zip(jax.tree.leaves(gradients(ample)), jax.tree.leaves(gradients(dropless)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


def test_padding_is_no_token():
    losses = (F(LoadBalance, coefficient=1e-3),)
    graph, params = made(router=F(TopK, top_k=2, bias=SignBias), losses=losses)
    moe, x_BTD = functools.partial(call(graph), params), inputs()
    real_BT = jnp.broadcast_to(jnp.arange(T) < 7, (B, T))
    _, padded = moe(x_BTD, PLAIN.replace(segments_BT=real_BT.astype(jnp.int32)))
    _, alone = moe(x_BTD[:, :7], Context.of(jnp.zeros((B, 7))))
    assert padded.keys() == alone.keys()
    for name in padded:
        np.testing.assert_allclose(padded[name], alone[name], rtol=1e-5)


def test_bias_learns_from_the_choices_of_real_tokens_alone():
    graph, params = made(router=F(TopK, top_k=2, bias=SignBias))
    real_BT = jnp.broadcast_to(jnp.arange(T) < 7, (B, T))
    ctx, x_BTD = PLAIN.replace(segments_BT=real_BT.astype(jnp.int32)), inputs()

    def total(params):
        moe = nnx.merge(graph, params)
        return jnp.sum(moe(x_BTD, ctx)[0]), moe.router(x_BTD, ctx).index_BTJ

    gradient, index = jax.jit(jax.grad(total, has_aux=True))(params)
    chosen = np.asarray(index)[:, :7].ravel()
    np.testing.assert_array_equal(gradient["router"]["bias"], np.bincount(chosen, minlength=E))


def test_jitter_moves_the_choice_in_training_only():
    graph, params = made(router=F(TopK, top_k=2, jitter=0.5))
    router, x_BTD = nnx.merge(graph, params).router, inputs()
    train = PLAIN.replace(train=True, key=jax.random.key(0))
    assert not np.allclose(router(x_BTD, train).logits_BTE, router(x_BTD, PLAIN).logits_BTE)
    with pytest.raises(ValueError, match=r"TopK\.jitter"):
        router(x_BTD, PLAIN.replace(train=True))


def test_flops_are_what_xla_counts_at_a_capacity_of_the_mean_load():
    wide, length = 128, 32
    full = F(Capacity, factor=1.0, minimum=1)
    build = F(MoE, wide, router=F(TopK, top_k=2), experts=F(Experts, count=4, width=24), dispatch=full)
    build = F(build, shared=F(GatedMLP, width=24), shared_gate=True)
    graph, params, _ = random_module(lambda rngs: build(rngs=rngs))
    x_BTD = jax.ShapeDtypeStruct((1, length, wide), jnp.float32)
    ctx = Context.of(jnp.zeros((1, length)), train=True)
    counted = (
        jax.jit(lambda p, x: nnx.merge(graph, p)(x, ctx)[0]).lower(params, x_BTD).compile().cost_analysis()["flops"]
    )
    stated = nnx.merge(graph, params).flops_per_token(length)
    assert stated <= 1.02 * counted / length < 1.35 * stated


def test_flops_are_of_the_experts_that_a_token_visits():
    around = 2 * D * E
    assert nnx.merge(*made(router=F(TopK, top_k=2))).flops_per_token(9) == around + 2 * 6 * D * WIDTH
    budget = F(TopK, top_k=3, bias=F(BudgetBias, target=2.5))
    moe = nnx.merge(*made(router=budget, zero_experts=F(ZeroExperts, identity=2)))
    assert moe.flops_per_token(9) == 2 * D * (E + 2) + 2.5 * 6 * D * WIDTH


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit():
    build = F(MoE, router=F(TopK, top_k=2), experts=EXPERTS, shared=F(GatedMLP, width=4))
    block = F(Block, mixer=F(Attention, heads=1), ffn=build, norm=RMSNorm)
    stack = jax.eval_shape(lambda: Stack(D, pattern=(block,), depth=3, rngs=nnx.Rngs(params=0)))
    stored = sum(leaf.size for leaf in jax.tree.leaves(stack))
    assert active_parameters(stack) == stored - 3 * (E - 2) * 3 * D * WIDTH


@pytest.mark.parametrize(
    ("build", "knob"),
    [
        (F(made, router=F(TopK, top_k=7)), "TopK.top_k=7"),
        (F(made, router=F(TopK, top_k=0)), "TopK.top_k=0"),
        (F(made, router=F(TopK, top_k=2, score="tanh")), "TopK.score='tanh'"),
        (F(made, router=F(TopK, top_k=2, scale=0.0)), "TopK.scale=0.0"),
        (F(made, router=F(TopK, top_k=2, jitter=1.0)), "TopK.jitter=1.0"),
        (F(made, router=F(TopK, top_k=2, limit=F(GroupLimit, groups=4, top_groups=2))), "GroupLimit.groups=4"),
        (F(made, router=F(TopK, top_k=5, limit=F(GroupLimit, groups=3, top_groups=2))), "GroupLimit.top_groups=2"),
        (F(made, router=F(TopK, top_k=2, limit=F(GroupLimit, groups=3, top_groups=2, best=3))), "GroupLimit.best=3"),
        (F(made, router=F(TopK, top_k=2), shared_gate=True), "MoE.shared_gate"),
        (F(ZeroExperts, D, rngs=nnx.Rngs(0)), "ZeroExperts.identity"),
        (F(ZeroExperts, D, zero=-1, rngs=nnx.Rngs(0)), "ZeroExperts.zero=-1"),
        (F(Capacity, factor=0.0), "Capacity.factor=0.0"),
        (F(Capacity, evaluation_factor=-1.0), "Capacity.evaluation_factor=-1.0"),
        (F(Capacity, minimum=0), "Capacity.minimum=0"),
        (F(Capacity, priority="age"), "Capacity.priority='age'"),
    ],
)
def test_bad_knobs_are_refused_by_name(build, knob):
    with pytest.raises(ValueError, match=knob):
        build()


def test_two_kinds_of_balancing_at_once_are_warned_of():
    with pytest.warns(UserWarning, match="LoadBalance.coefficient"):
        made(router=F(TopK, top_k=2, bias=SignBias), losses=(LoadBalance,))
