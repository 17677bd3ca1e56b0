"""Experts cut into finer ones: what happens to the variance of their output, and what TopK.scale does about it
(LongCat-Flash, arXiv 2509.01322, section 2.3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.context import Context
from layers.experts import Experts
from layers.moe import MoE
from layers.routers import TopK
from tests.reference.random import random_module

F = functools.partial
D, COUNT, TOP_K, WIDTH = 32, 8, 2, 64
STD = 0.05  # of all weights, the router's too: its choices begin nearly uniform, as where networks begin


@functools.cache
def variance(m: int, scale: float, follows_width: bool = False) -> float:
    """Of the output for unit inputs, every expert cut into m of 1 / m of its width, m times as many of them chosen.

    follows_width: the last product's weights are drawn with a variance of 1 / width instead of STD^2, as
    `Experts.std = None` does; of the uncut experts they have STD^2 either way.
    """
    graph, params, _ = random_module(
        lambda rngs: MoE(
            D,
            router=F(TopK, top_k=TOP_K * m, norm_topk=False, scale=scale),
            experts=F(Experts, count=COUNT * m, width=WIDTH // m),
            rngs=rngs,
        ),
        std=STD,
    )
    if follows_width:
        params["experts"]["down"] = params["experts"]["down"] * m**0.5
    x_BTD = jax.random.normal(jax.random.key(0), (2, 256, D))
    run = jax.jit(lambda params, x_BTD: nnx.merge(graph, params)(x_BTD, Context.of(x_BTD[..., 0]))[0])
    return float(np.var(run(params, jnp.asarray(x_BTD))))


@pytest.mark.parametrize("m", [2, 4, 8])
def test_a_scale_of_m_keeps_the_variance_of_experts_cut_in_m(m):
    # m pieces share the gate's mass and each is m times narrower; the two factors of m are the square of the scale.
    assert variance(m, scale=1.0) / variance(1, scale=1.0) == pytest.approx(1 / m**2, rel=0.1)
    assert variance(m, scale=float(m)) / variance(1, scale=1.0) == pytest.approx(1.0, rel=0.1)


def test_where_initial_weights_follow_the_width_the_root_of_m_is_enough():
    assert variance(4, scale=2.0, follows_width=True) / variance(1, scale=1.0) == pytest.approx(1.0, rel=0.1)
