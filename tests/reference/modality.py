"""A small modality-aware mixture of experts, and tokens of two modalities with padding for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.context import Context
from layers.modality_moe import ModalityMoE
from tests.reference.moma import sigmoid
from tests.reference.random import random_module

B, T, D, W = 2, 18, 8, 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D)).astype(np.float32)
MODALITY = RNG.integers(0, 2, (B, T))
SEGMENTS = np.where(np.arange(T) < [[T], [14]], 1, 0)


@functools.cache
def layer(std=0.5, **knobs):
    build = functools.partial(ModalityMoE, D, width=W, **knobs)
    graph, params, _ = random_module(lambda rngs: build(rngs=rngs), std=std)
    call = jax.jit(lambda params, x_BTD, ctx: nnx.merge(graph, params)(x_BTD, ctx))
    return graph, params, call


def silu(x):
    return x * sigmoid(x)


def context(modality=MODALITY, segments=SEGMENTS, **fields):
    segments = None if segments is None else jnp.asarray(segments)
    ctx = Context.of(jnp.zeros((B, T)), segments_BT=segments, modality_BT=jnp.asarray(modality), modalities=2)
    return ctx.replace(**fields)


def loops(params):
    """The groups as the reference takes them."""
    groups = [params["groups"][i] for i in sorted(params["groups"])]
    return [
        {k: np.asarray(v) for k, v in group["experts"].items()}
        | ({"router": np.asarray(group["router"])} if "router" in group else {})
        for group in groups
    ]
