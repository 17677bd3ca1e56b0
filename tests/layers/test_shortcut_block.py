"""The shortcut block against its equations, while decoding, and inside a scanned, rematerialised stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes
from layers.attention import Attention
from layers.balance import LoadBalance, SignBias
from layers.context import Context
from layers.experts import Experts
from layers.mla import MLA
from layers.mlp import GatedMLP
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.routers import TopK
from layers.shortcut_block import ShortcutBlock
from layers.stack import Stack
from layers.zero_experts import ZeroExperts
from tests.reference.random import random_module

F = functools.partial
D, E, B, T = 8, 4, 2, 9
MIXTURE = F(
    MoE,
    router=F(TopK, top_k=3, scale=2.0, bias=F(SignBias, rate=0.5, recenter=False)),
    experts=F(Experts, count=E - 1, width=4),
    zero_experts=F(ZeroExperts, identity=1),
    losses=(F(LoadBalance, coefficient=1e-3),),
)
BLOCK = F(ShortcutBlock, mixer=F(Attention, heads=2), ffn=F(GatedMLP, width=6), moe=MIXTURE, norm=RMSNorm)
PLAIN = Context.of(jnp.zeros((B, T)))


def made(build):
    graph, params, _ = random_module(lambda rngs: build(D, rngs=rngs))
    return graph, jax.tree.map(jnp.asarray, params)


def inputs():
    return jax.random.normal(jax.random.key(1), (B, T, D))


@pytest.mark.parametrize("shortcut", [True, False])
def test_order_is_that_of_the_equations(shortcut):
    graph, params = made(F(BLOCK, shortcut=shortcut))

    @jax.jit
    def both(params, x):
        block = nnx.merge(graph, params)
        return block(x, PLAIN), equations(block, x, shortcut)

    (got, aux), (want, moe_aux) = both(params, inputs())
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(aux["loss"], moe_aux["loss"])
    np.testing.assert_allclose(aux["ffn/load"], moe_aux["load"])


def equations(block, x, shortcut):
    h = x + block.mixer(block.mixer_norm(x), PLAIN)[0]
    u = block.ffn_norm(h)
    m, moe_aux = block.moe(u, PLAIN)
    h = h + block.ffn(u, PLAIN)[0] + (0.0 if shortcut else m)
    h = h + block.second_mixer(block.second_mixer_norm(h), PLAIN)[0]
    return h + block.second_ffn(block.second_ffn_norm(h), PLAIN)[0] + (m if shortcut else 0.0), moe_aux


def test_decoding_equals_the_whole_row():
    graph, params = made(BLOCK)
    extend = jax.jit(lambda params, x, cache, ctx: nnx.merge(graph, params).extend(x, cache, ctx))
    whole = jax.jit(lambda params, x: nnx.merge(graph, params)(x, PLAIN)[0])(params, x := inputs())
    cache, out, at = nnx.merge(graph, params).init_cache(B, T, jnp.float32), [], 0
    for size in (4, 1, 4):
        ctx = Context(PLAIN.positions_BT[:, at : at + size], None, jnp.full(B, size))
        y, cache = extend(params, x[:, at : at + size], cache, ctx)
        out.append(y)
        at += size
    np.testing.assert_allclose(jnp.concatenate(out, 1), whole, atol=1e-5)


@pytest.mark.large
def test_bias_learns_in_every_layer_of_a_stack_however_it_runs():
    """The counts of each layer reach the rule of that layer once, through scan and recomputation."""
    statistics, losses = {}, {}
    for scan, remat in ((True, "full"), (False, "none")):
        build = F(Stack, D, pattern=(BLOCK,), depth=2, scan=scan, remat=remat)
        graph, params, _ = random_module(lambda rngs, build=build: build(rngs=rngs))
        state = nnx.split(nnx.merge(graph, params))[1]

        def run(state, x_BTD, graph=graph):
            y_BTD, aux = nnx.merge(graph, state)(x_BTD, PLAIN)
            return jnp.sum(jnp.sin(y_BTD)), aux

        gradient, aux = jax.jit(jax.grad(run, has_aux=True))(state, inputs())
        bias = gradient["periods"][0]["moe"]["router"]["bias"]
        assert isinstance(bias, axes.Buffer) and bias.get_metadata("axes") == ("layers", "routed")
        statistics[scan], losses[scan] = bias[...], aux["loss"]
        assert aux["ffn/load"].shape == (2,)
    np.testing.assert_array_equal(statistics[True], statistics[False])
    np.testing.assert_array_equal(statistics[True].sum(1), B * T * 3)
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
    moved = bias.get_metadata("rule")(jnp.zeros((2, E)), statistics[True], 0.0)
    assert set(np.unique(moved)) <= {-0.5, 0.0, 0.5} and (moved[0] != moved[1]).any()


def test_a_prefix_that_the_mixers_would_ignore_is_refused():
    latent = F(MLA, heads=2, kv_rank=4, nope_dim=2, rope_dim=2, value_dim=2, rope=RoPE)
    block, ctx = nnx.merge(*made(F(BLOCK, mixer=latent))), PLAIN.replace(prefix_BT=jnp.ones((B, T), bool))
    with pytest.raises(ValueError, match=r"ShortcutBlock\.mixer=MLA cannot let all tokens see a prefix"):
        block(inputs(), ctx)
    with pytest.raises(ValueError, match=r"ShortcutBlock\.mixer=MLA"):
        block.extend(inputs(), block.init_cache(B, T, jnp.float32), ctx.replace(lengths_B=jnp.full(B, T)))


def test_flops_are_the_sum_of_the_parts():
    block = jax.eval_shape(lambda: BLOCK(D, rngs=nnx.Rngs(params=0)))
    attention, dense = block.mixer.flops_per_token(T), 6 * D * 6
    assert block.flops_per_token(T) == 2 * attention + 2 * dense + 2 * D * E + 3 * (E - 1) / E * 6 * D * 4
