"""The balance loss over all layers together against transformers' own, in a stack, and where it is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from layers import block
from layers.attention import Attention
from layers.balance import LoadBalance
from layers.context import Context
from layers.experts import Experts
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.pooled_balance import PooledBalance, pool
from layers.routers import Routing, TopK
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.objectives.batch import read_aux
from tests.reference.random import random_module

F = functools.partial
L, B, T, D, E, J = 3, 2, 9, 8, 5, 2
REAL = np.arange(T) < [[T], [6]]
LOSS = PooledBalance(E, 0, J, coefficient=0.25)


def routing_of(logits_BTE):
    probability_BTE = jax.nn.softmax(logits_BTE)
    index_BTJ = jax.lax.top_k(probability_BTE, J)[1]
    return Routing(index_BTJ, jnp.take_along_axis(probability_BTE, index_BTJ, -1), probability_BTE, logits_BTE)


def stacked(logits_LBTE, loss=LOSS):
    """What a stack of these layers reports before anything is put together."""
    reports = [loss.report(routing_of(logits_BTE), jnp.asarray(REAL)) for logits_BTE in logits_LBTE]
    return {f"ffn/{name}": jnp.stack([report[name] for report in reports]) for name in reports[0]}


def test_value_and_gradient_equal_those_of_transformers(record_property):
    logits_LBTE = np.random.default_rng(0).normal(size=(L, B, T, E)).astype(np.float32) * 2

    def ours(logits_LBTE):
        return pool(stacked(logits_LBTE))["loss"][0]

    value, gradient = jax.jit(jax.value_and_grad(ours))(logits_LBTE)
    gates = torch.tensor(logits_LBTE.reshape(L, B * T, E), requires_grad=True)
    theirs = load_balancing_loss_func(tuple(gates), E, J, attention_mask=torch.tensor(REAL.astype(np.int64)))
    theirs.backward()
    worst = abs(float(value) - 0.25 / J * theirs.item())
    record_property("worst pooled balance loss", worst)
    assert worst < 1e-6
    np.testing.assert_allclose(gradient, gates.grad.numpy().reshape(L, B, T, E) * 0.25 / J, atol=1e-6)


def test_opposite_layers_cancel_in_the_pool_alone():
    """Two layers, each of which sends all tokens to two experts of its own."""
    pairs_LE = np.asarray([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]])
    logits_LBTE = jnp.asarray(20.0 * np.broadcast_to(pairs_LE[:, None, None], (2, B, T, E)))
    apart = [LoadBalance(E, 0, J)(routing_of(logits_BTE), jnp.asarray(REAL)) for logits_BTE in logits_LBTE]
    np.testing.assert_allclose(apart, 2.5, rtol=1e-5)
    np.testing.assert_allclose(pool(stacked(logits_LBTE))["ffn/pooled_balance"], 1.25, rtol=1e-5)


def test_a_stack_adds_it_to_the_loss_once_whatever_repeats():
    mixture = F(MoE, router=F(TopK, top_k=J), experts=F(Experts, count=E, width=4))
    plain, both = (
        (F(LoadBalance, coefficient=0.5),),
        (F(LoadBalance, coefficient=0.5), F(PooledBalance, coefficient=0.25)),
    )
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
    ctx = Context.of(jnp.zeros((B, T)), segments_BT=jnp.asarray(REAL, jnp.int32))

    def run(losses, **knobs):
        layer = F(block.Block, mixer=F(Attention, heads=2), ffn=F(mixture, losses=losses), norm=RMSNorm)
        graph, params, _ = random_module(lambda rngs: Stack(D, pattern=(layer,), depth=L, **knobs, rngs=rngs), std=0.5)
        return jax.jit(lambda params: nnx.merge(graph, params)(x_BTD, ctx)[1])(params)

    without, told = run(plain), run(both, remat="full")
    assert not [name for name in told if "pooled/" in name]
    (value,) = told["ffn/pooled_balance"]
    assert told["loss"].shape == (L + 1,) and without["loss"].shape == (L,)
    np.testing.assert_allclose(told["loss"], [*without["loss"], 0.25 * value], rtol=1e-6)
    np.testing.assert_allclose(told["ffn/load_balance"], without["ffn/load_balance"], rtol=1e-6)
    losses, metrics = read_aux(told, jnp.float32(7))
    np.testing.assert_allclose(losses, 7 * np.sum(told["loss"]), rtol=1e-6)
    np.testing.assert_allclose(metrics["layers/ffn/pooled_balance"].value(), value, rtol=1e-6)


def test_sums_that_nobody_puts_together_are_refused():
    """Of a stage of 1F1B, or a module of multi-token prediction: the loss would be lost without a word."""
    with pytest.raises(UserError, match="PooledBalance needs all layers in one place"):
        read_aux(stacked(np.zeros((L, B, T, E), np.float32)), jnp.float32(1))
    with pytest.raises(ValueError, match=r"PooledBalance\.coefficient=0\.0"):
        PooledBalance(E, 0, J, coefficient=0.0)
