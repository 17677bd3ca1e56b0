"""Auxiliary routers learn the choices of a frozen model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.attention import Attention
from layers.auxiliary_router import AuxiliaryRouter
from layers.block import Block
from layers.context import Context
from layers.language_model import LanguageModel
from layers.mixture_of_depths import MixtureOfDepths
from layers.mlp import GatedMLP
from layers.modality_moe import ModalityMoE
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.objectives.auxiliary_routers import AuxiliaryRouters
from maxlike.optimizers.adamw import AdamW
from maxlike.optimizers.only import Only
from maxlike.schedules import Clock, Constant
from tests.reference.random import random_module

B, T, V = 4, 16, 12
F = functools.partial


def build(auxiliary, evaluation):
    routing = {"auxiliary": auxiliary, "evaluation": evaluation}
    ffn = F(ModalityMoE, groups=(2, 3), width=12, router_noise="gumbel_sigmoid", routing_scope="batch", **routing)
    block = F(Block, mixer=F(Attention, heads=2, rope=RoPE), norm=RMSNorm, order="swin")
    thinned = F(MixtureOfDepths, block=F(block, ffn=F(GatedMLP, width=12)), capacity=0.5, **routing)
    stack = F(Stack, pattern=(thinned, F(block, ffn=ffn)), depth=2, scan=True)
    return lambda rngs: LanguageModel(vocab=V, dim=16, stack=stack, norm=RMSNorm, modality_starts=(6,), rngs=rngs)


def batch(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1))
    return {
        "inputs": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "segment_ids": jnp.asarray(np.where(np.arange(T) < 14, 1, 0) * np.ones((B, 1), int), jnp.int32),
        "positions": jnp.asarray(np.arange(T) * np.ones((B, 1), int), jnp.int32),
        "loss_weights": jnp.asarray(np.where(np.arange(T) < 13, 1.0, 0.0) * np.ones((B, 1)), jnp.float32),
        "target_bytes": jnp.ones((B, T), jnp.int32),
    }


@pytest.mark.large
def test_only_auxiliary_routers_learn_and_they_foretell_the_choice():
    graph, params, _ = random_module(build(AuxiliaryRouter, "auxiliary"))
    _, abstract = jax.eval_shape(lambda: nnx.split(build(AuxiliaryRouter, "auxiliary")(nnx.Rngs(params=0))))
    axes = nnx.to_pure_dict(abstract, extract_fn=lambda variable: variable.get_metadata("axes"))
    objective, data = AuxiliaryRouters(), batch(0)
    optimizer = Only(optimizer=AdamW(schedule=Constant(lr=0.03), weight_decay=0.5))
    told = optimizer.describe(axes)
    assert {path for path, what in told.items() if what != "frozen"} == {path for path in told if "auxiliary" in path}
    transform = optimizer(axes, Clock(steps=100, tokens_per_step=1))

    def total(params, key):
        loss, metrics = objective(nnx.merge(graph, params), data, key)
        return loss.total / loss.weight, metrics

    @jax.jit
    def step(params, state, key):
        (loss, metrics), grads = jax.value_and_grad(total, has_aux=True)(params, key)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, metrics

    state, trained, losses = transform.init(params), params, []
    for i in range(60):
        trained, state, loss, metrics = step(trained, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    accuracies = [float(mean.value()) for name, mean in metrics.items() if name.endswith("auxiliary_accuracy")]
    assert len(accuracies) == 2 and min(accuracies) > 0.8  # of the experts, and of the depth
    for (path, before), after in zip(jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(trained)):
        name = jax.tree_util.keystr(path)
        assert np.array_equal(before, after) != ("auxiliary" in name), name
    evaluated = jax.jit(lambda p: objective(nnx.merge(graph, p), data, None)[1])(trained)
    assert float(evaluated["loss"].value()) == pytest.approx(losses[-1], rel=0.2)  # the same choices, without noise
    assert float(evaluated["next_token/loss"].weight) == B * 13
    # The network routed by them is close to the network that they stand in for, and closer than with untrained ones.
    top_k = jax.jit(lambda p: nnx.merge(graph, p)(data["inputs"], _context(data, train=True)).hidden_BTD)(params)
    routed = jax.jit(lambda p: nnx.merge(graph, p)(data["inputs"], _context(data)).hidden_BTD)
    real = np.asarray(data["segment_ids"]) > 0
    far, near = (float(np.mean(np.square(routed(p) - top_k)[real])) for p in (params, trained))
    assert near < 0.5 * far


def _context(data, **fields):
    return Context(positions_BT=data["positions"], segments_BT=data["segment_ids"], **fields)


def test_a_model_without_auxiliary_routers_is_refused():
    graph, params, _ = random_module(build(None, "top_k"))
    with pytest.raises(UserError, match=r"set ModalityMoE\.auxiliary or MixtureOfDepths\.auxiliary"):
        jax.eval_shape(lambda: AuxiliaryRouters()(nnx.merge(graph, params), batch(0), None))
