"""What every mixer and feed-forward owes inside a stack that trains: that neither the loop over layers, nor
rematerialisation, nor cutting the batch changes its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.block import Block
from layers.context import Context
from layers.norm import RMSNorm
from layers.stack import Stack
from tests.layers.test_contract import MIXERS, PARTS, D, F, T
from tests.reference.random import random_module

B = 4
# Experts choose among all rows of the batch, and their noise is drawn for all rows at once: halves choose otherwise.
NEEDS_WHOLE_BATCH = ("modality_moe_2t3i",)
# Compiling them all takes a minute: further variants of a class wait for `pytest -m large`.
FURTHER = ("encoder", "multi_head", "sliding_window", "capped_with_sinks", "gated_values", "mla_with_query_rank")
FURTHER += ("mamba2_kv_heads", "lightning", "geglu", "modality_moe_1t1i", "moe_dropless")
NAMES = [pytest.param(name, marks=pytest.mark.large) if name in FURTHER else name for name in PARTS]


class NoMixer(nnx.Module):
    """Adds nothing to the residual stream: a stack of feed-forwards alone."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD, ctx):
        return jnp.zeros_like(x_BTD), {}


def gradients(name: str, **how):
    """(loss(y), gradients of the parameters and of x) of two layers in training, compiled; and the parameters."""
    children = {"mixer": PARTS[name], "ffn": None} if name in MIXERS else {"mixer": NoMixer, "ffn": PARTS[name]}
    block = F(Block, **children, norm=RMSNorm)
    graph, params, _ = random_module(lambda rngs: Stack(D, pattern=(block,), depth=2, **how, rngs=rngs))

    def loss(params, x_BTD, target_BTD):
        ctx = Context.of(x_BTD[..., 0], train=True, key=jax.random.key(3))
        return jnp.sum(nnx.merge(graph, params)(x_BTD, ctx)[0] * target_BTD)

    return jax.jit(jax.value_and_grad(loss, (0, 1))), params


@pytest.mark.parametrize("name", NAMES)
def test_scanned_rematerialised_and_whole_equals_unrolled_kept_and_halves(name):
    """One comparison for three identities, as each program costs a second to compile: the scanned stack that keeps only
    the inputs of its blocks runs the whole batch, the unrolled one that keeps everything runs its halves."""
    x_BTD, target_BTD = jax.random.normal(jax.random.key(2), (2, B, T, D))
    run, params = gradients(name, scan=True, remat="full")
    plain, _ = gradients(name, scan=False, remat="none")
    got_loss, (got, got_x) = run(params, x_BTD, target_BTD)
    cuts = [slice(0, B)] if name in NEEDS_WHOLE_BATCH else [slice(0, B // 2), slice(B // 2, B)]
    pieces = [plain(params, x_BTD[rows], target_BTD[rows]) for rows in cuts]
    want_loss = sum(loss for loss, _ in pieces)
    want = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (piece[0] for _, piece in pieces))
    want_x = jnp.concatenate([piece[1] for _, piece in pieces])
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5, atol=1e-3)
    leaves = jax.tree.leaves_with_path({"x": want_x, "params": want})
    for (path, leaf), other in zip(leaves, jax.tree.leaves({"x": got_x, "params": got}), strict=True):
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(other, leaf, atol=1e-4 * scale, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
    assert float(jnp.abs(want_x - target_BTD).max()) > 0.1, "the layers added nothing"
