"""Auxiliary routers of a modality-aware mixture: causal where top-k is not, and judged by its choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.auxiliary_router import AuxiliaryRouter
from layers.context import Context
from tests.reference.modality import MODALITY, RNG, SEGMENTS, B, X, context, layer, loops, silu
from tests.reference.moma import expert_choice, sigmoid

AUXILIARY = {"groups": (4, 3), "auxiliary": AuxiliaryRouter, "evaluation": "auxiliary"}


def test_auxiliary_routing_is_causal_and_top_k_is_not():
    """The second half documents the leak: a later token of the same modality takes an earlier one's place."""
    _, params, call = layer(**AUXILIARY)
    changed = X.copy()
    changed[:, 10:] += RNG.normal(size=changed[:, 10:].shape)
    outputs = [np.asarray(call(params, x, context(segments=None))[0]) for x in (X, changed)]
    np.testing.assert_array_equal(outputs[0][:, :10], outputs[1][:, :10])
    training = context(segments=None, train=True)
    leaking = [np.asarray(call(params, x, training)[0]) for x in (X, changed)]
    assert np.abs(leaking[0] - leaking[1])[:, :10].max() > 0.1


def test_auxiliary_routing_is_its_formula_and_decodes_token_by_token():
    _, params, call = layer(**AUXILIARY)
    got, aux = call(params, X, context())
    expected = np.zeros_like(X)
    for m, index in enumerate(sorted(params["groups"])):
        group = params["groups"][index]
        fires = sigmoid(silu(X @ group["auxiliary"]["up"]) @ group["auxiliary"]["out"]) > 0.5
        fires = fires & ((m == MODALITY) & (SEGMENTS > 0))[..., None]
        h = silu(np.einsum("btd,edf->btef", X, group["experts"]["gate"]))
        h = h * np.einsum("btd,edf->btef", X, group["experts"]["up"])
        weight = np.where(fires, sigmoid(X @ group["router"]), 0)
        expected += np.einsum("btef,efd,bte->btd", h, group["experts"]["down"], weight)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert float(aux["max_load"]) > 1
    for t in (0, 5):
        ctx = Context(jnp.full((B, 1), t), None, jnp.ones(B, int), jnp.asarray(MODALITY[:, t : t + 1]), modalities=2)
        step, _ = call(params, X[:, t : t + 1], ctx)
        np.testing.assert_allclose(step[:, 0], got[:, t], atol=2e-5)


def test_decoding_leaves_alone_the_experts_that_no_token_chose():
    """Their weights are not a number here: a product with them, even times zero, would show."""
    _, params, call = layer(**AUXILIARY)
    x_B1D, modality_B1 = X[:, :1], np.asarray([[0], [1]])
    ctx = Context(jnp.zeros((B, 1), int), None, jnp.ones(B, int), jnp.asarray(modality_B1), modalities=2)
    expected, _ = call(params, x_B1D, ctx)
    poisoned, spared = params, 0
    for m, index in enumerate(sorted(params["groups"])):
        group = params["groups"][index]
        idle_E = silu(x_B1D[m, 0] @ group["auxiliary"]["up"]) @ group["auxiliary"]["out"] <= 0
        experts = {name: np.where(idle_E[:, None, None], np.nan, w) for name, w in group["experts"].items()}
        poisoned = {"groups": poisoned["groups"] | {index: group | {"experts": experts}}}
        spared += idle_E.sum()
    assert 0 < spared < 7
    np.testing.assert_array_equal(call(poisoned, x_B1D, ctx)[0], expected)


def test_auxiliary_routers_are_judged_by_the_choice_without_changing_it():
    graph, params, call = layer(**AUXILIARY)
    training = context(train=True)
    got, aux = call(params, X, training)
    _, plain, bare = layer(groups=(4, 3))
    same = jax.tree_util.tree_map_with_path(lambda path, leaf: _at(params, path), plain)
    np.testing.assert_array_equal(got, bare(same, X, training)[0])
    losses, accuracies = [], []
    for m, index in enumerate(sorted(params["groups"])):
        group = params["groups"][index]
        p = sigmoid(silu(X @ group["auxiliary"]["up"]) @ group["auxiliary"]["out"])
        own, chosen = (m == MODALITY) & (SEGMENTS > 0), np.zeros(p.shape, bool)
        for row in range(B):
            for (g, e), tokens in expert_choice(X[row], loops(params), MODALITY[row], SEGMENTS[row] > 0)[1].items():
                if g == m:
                    chosen[row, tokens, e] = True
        losses.append(np.mean(-np.where(chosen, np.log(p), np.log(1 - p))[own]))
        accuracies.append(np.mean(((p > 0.5) == chosen)[own]))
    assert float(aux["auxiliary_bce"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(aux["auxiliary_accuracy"]) == pytest.approx(np.mean(accuracies), rel=1e-5)
    gradient = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(jnp.asarray(X), training)[1]["auxiliary_bce"]))(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        moved = "auxiliary" in jax.tree_util.keystr(path)
        assert bool(np.abs(leaf).max() > 0) == moved, jax.tree_util.keystr(path)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree
