"""Block orders against their formulas, and how the children's aux travels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.mlp import GatedMLP
from layers.norm import Identity, LayerNorm, RMSNorm
from layers.stack import Stack
from tests.reference.random import random_module

X = jax.random.normal(jax.random.key(0), (2, 5, 16))
CTX = Context.of(jnp.zeros((2, 5)))
FORMULAS = {
    "pre": lambda x, f, s, norm, _: x + s * f(norm(x)),
    "post": lambda x, f, s, norm, _: norm(x + s * f(x)),
    "sandwich": lambda x, f, s, norm, out_norm: x + s * out_norm(f(norm(x))),
    "swin": lambda x, f, s, norm, _: x + s * norm(f(x)),
    "deepnorm": lambda x, f, s, norm, _: 1.7 * norm(x) + s * f(norm(x)),
}


def make(rngs, **knobs):
    knobs = {"mixer": functools.partial(Attention, heads=2), "ffn": functools.partial(GatedMLP, width=8)} | knobs
    return Block(16, norm=RMSNorm, rngs=rngs, **knobs)


def build(**knobs):
    graph, params, _ = random_module(lambda rngs: make(rngs, **knobs))
    return nnx.merge(graph, params)


@pytest.mark.parametrize("order", FORMULAS)
@pytest.mark.parametrize("knobs", [{}, {"ffn": None}], ids=["both", "mixer_only"])
def test_order_is_its_formula(order, knobs):
    knobs = knobs | ({"skip_scale": 1.7} if order == "deepnorm" else {})
    graph, params, _ = random_module(lambda rngs: make(rngs, order=order, residual_scale=0.5, **knobs))

    @jax.jit
    def run(params):
        block = nnx.merge(graph, params)
        x = FORMULAS[order](X, lambda h: block.mixer(h, CTX)[0], 0.5, block.mixer_norm, block.mixer_out_norm)
        if block.ffn is not None:
            x = FORMULAS[order](x, lambda h: block.ffn(h, CTX)[0], 0.5, block.ffn_norm, block.ffn_out_norm)
        return x, block(X, CTX)[0], block.extend(X, block.init_cache(2, 5, jnp.float32), CTX)[0]

    expected, got, decoded = run(params)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


class Reporting(GatedMLP):
    """A feed-forward with a loss and a metric."""

    def __call__(self, x_BTD, ctx):
        return super().__call__(x_BTD, ctx)[0], {"loss": jnp.float32(2.0), "load": jnp.arange(3.0)}


class ReportingMixer(Attention):
    """A mixer with a loss and a metric of the same name."""

    def __call__(self, x_BTD, ctx):
        return super().__call__(x_BTD, ctx)[0], {"loss": jnp.float32(1.0), "load": jnp.float32(7.0)}


def test_losses_add_up_and_metrics_keep_their_owner():
    block = build(mixer=functools.partial(ReportingMixer, heads=2), ffn=functools.partial(Reporting, width=8))
    aux = jax.jit(lambda: block(X, CTX)[1])()
    assert set(aux) == {"loss", "mixer/load", "ffn/load"}
    assert float(aux["loss"]) == 3.0 and float(aux["mixer/load"]) == 7.0
    assert "loss" not in jax.eval_shape(lambda: build()(X, CTX)[1])


def test_flops_are_the_childrens():
    block = build()
    assert block.flops_per_token(64) == block.mixer.flops_per_token(64) + block.ffn.flops_per_token(64)


def test_refusals():
    with pytest.raises(ValueError, match=r"Block.order='middle'"):
        build(order="middle")
    with pytest.raises(ValueError, match=r"Block.residual_scale=0"):
        build(residual_scale=0.0)
    with pytest.raises(ValueError, match=r"Block.skip_scale=2.0"):
        build(skip_scale=2.0)
    with pytest.raises(ValueError, match=r"Block.skip_scale=-1.0"):
        build(order="deepnorm", skip_scale=-1.0)


def test_a_deep_stack_of_deepnorm_starts_near_its_residual():
    """GLM-130B's init at 64 layers: Xavier, its gain beta = (2 depth)^-0.5 on values, outputs and the feed-forward."""
    depth, dim, width = 64, 64, 192
    alpha, beta = (2 * depth) ** 0.5, (2 * depth) ** -0.5
    mixer = functools.partial(Attention, heads=4, branch_gain=beta)
    ffn = functools.partial(GatedMLP, width=width, activation="gelu", std=beta * (2 / (dim + width)) ** 0.5)
    make = functools.partial(Block, dim, mixer=mixer, ffn=ffn, norm=LayerNorm, order="deepnorm", skip_scale=alpha)
    block = make(rngs=nnx.Rngs(params=0))
    plain = Attention(dim, heads=4, rngs=nnx.Rngs(params=0))
    for name, gain in (("query", 1.0), ("key", 1.0), ("value", beta), ("out", beta)):
        ratio = getattr(block.mixer, name).kernel[...] / getattr(plain, name).kernel[...]
        np.testing.assert_allclose(ratio, gain, rtol=1e-5)
    x = jax.random.normal(jax.random.key(0), (2, 16, dim))
    h = block.mixer_norm(x)
    assert jnp.linalg.norm(block.mixer(h, Context.of(x[..., 0]))[0]) < 0.1 * alpha * jnp.linalg.norm(h)
    h = block.ffn_norm(x)
    assert jnp.linalg.norm(block.ffn(h, CTX)[0]) < 0.1 * alpha * jnp.linalg.norm(h)


class Blind(nnx.Module):
    """A mixer that knows nothing of prefixes."""

    def __init__(self, dim, *, rngs):
        pass

    def __call__(self, x_BTD, ctx):
        return jnp.cumsum(x_BTD, 1), {}


def test_a_mixer_that_would_ignore_a_prefix_is_refused():
    with pytest.raises(ValueError, match=r"Block.mixer=Blind cannot"):
        build(mixer=Blind)(X, CTX.replace(prefix_BT=jnp.ones((2, 5), bool)))


def test_the_mixers_norm_may_differ():
    block = build(mixer_norm=Identity)
    x = X + block.mixer(X, CTX)[0]
    np.testing.assert_allclose(block(X, CTX)[0], x + block.ffn(block.ffn_norm(x), CTX)[0], atol=1e-5)


class Ones(nnx.Module):
    """A branch whose output shows what dropout did to it."""

    def __init__(self, dim, *, rngs):
        pass

    def __call__(self, x_BTD, ctx):
        return jnp.ones_like(x_BTD), {}


def drop(ctx, **knobs):
    """Which numbers the mixer and the feed-forward each give: 0, 1 or what is kept of it."""
    mixed = make(nnx.Rngs(0), mixer=Ones, ffn=None, **knobs)(X, ctx)[0] - X
    return mixed, make(nnx.Rngs(0), mixer=Ones, ffn=Ones, **knobs)(X, ctx)[0] - X - mixed


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    ctx = CTX.replace(train=True, key=jax.random.key(3))
    mixed, fed = (np.asarray(x) for x in drop(ctx, mixer_dropout=0.25, ffn_dropout=0.5))
    for y, share in ((mixed, 0.25), (fed, 0.5)):
        kept = np.isclose(y, 1 / (1 - share), atol=1e-5)
        np.testing.assert_allclose(y, np.where(kept, y, 0), atol=1e-5)
        assert abs(kept.mean() - (1 - share)) < 4 * (share * (1 - share) / kept.size) ** 0.5
    same = drop(ctx, mixer_dropout=0.5, ffn_dropout=0.5)
    assert not np.array_equal(same[0] > 1, same[1] > 1)  # two branches, two masks
    np.testing.assert_allclose(drop(ctx, ffn_dropout=0.5)[0], 1, atol=1e-5)


def test_dropout_does_not_touch_evaluation_and_needs_a_key():
    knobs = {"mixer_dropout": 0.5, "ffn_dropout": 0.5}
    evaluated = CTX.replace(key=jax.random.key(3))
    np.testing.assert_array_equal(build(**knobs)(X, evaluated)[0], build()(X, evaluated)[0])
    with pytest.raises(ValueError, match=r"Block.mixer_dropout=0.5 needs randomness"):
        build(**knobs)(X, CTX.replace(train=True))
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"Block.ffn_dropout={share} is outside"):
            build(ffn_dropout=share)


def test_every_layer_drops_other_numbers_scanned_or_not():
    ctx = CTX.replace(train=True, key=jax.random.key(3))
    block = functools.partial(Block, mixer=Ones, ffn=None, norm=RMSNorm, mixer_dropout=0.5)

    def sums(depth, scan):
        stack = Stack(16, pattern=(block,), depth=depth, scan=scan, remat="full", rngs=nnx.Rngs(0))
        return stack(jnp.zeros_like(X), ctx)[0] / 2

    one, two = sums(1, True), sums(2, True)
    np.testing.assert_array_equal(two, sums(2, False))
    assert float(jnp.mean((one == 1) & (two == 1))) > 0.1  # kept by the first layer and not by the second
