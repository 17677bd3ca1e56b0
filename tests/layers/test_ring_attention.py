"""Attention of rows cut over devices against attention by its definition, and the mixers and blocks around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes, kernels
from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.dual_chunk import DualChunk
from layers.linear_attention import LightningAttention
from layers.mla import MLA
from layers.norm import RMSNorm
from layers.relative_attention import RelativeAttention
from layers.rope import RoPE
from maxlike.collectives import collectives
from maxlike.row_order import head_tail
from maxlike.sharding import Mesh
from tests.reference.attention import attention as naive
from tests.reference.random import random_module

RULES = {"batch": "data", "length": "context", "residual_length": "context", "act_heads": "tensor", "act_embed": None}
B, T, H, G, K, V = 2, 32, 4, 2, 8, 6
# Documents that end at a cut and inside a part, padding behind them; and a row of one document.
SEGMENTS = np.array([[1] * 8 + [2] * 15 + [3] * 5 + [0] * 4, [1] * 32], np.int32)
PREFIX = np.arange(T) % 11 < 4


def layout(**shape):
    return Mesh(shape=shape, rules=RULES).open()


@functools.cache
def tensors() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V), "sinks": (H,), "weight": (B, T, H, V)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def differentiated(attend, x):
    """A jitted (y, its gradients by every array of x) of a weighted sum; not called yet."""

    def run(x):
        y = attend(x["q"], x["k"], x["v"], x.get("sinks"))
        return jnp.sum(y * tensors()["weight"]), y

    return jax.jit(jax.value_and_grad(run, has_aux=True))


CASES = {
    "two_devices_and_tensor": ({"data": 2, "context": 2, "tensor": 2}, None, {"causal": True}),
    "packed_in_balance": ({"context": 4, "data": 2}, 4, {"causal": True, "segments": True, "sinks": True}),
    "gathered_in_balance": ({"context": 4}, 4, {"causal": True, "segments": True, "gather": True}),
    "window": ({"context": 4}, None, {"causal": True, "segments": True, "window": 9, "soft_cap": 2.0}),
    "both_sides": ({"context": 8}, None, {"causal": False, "segments": True, "window": 6}),
    "prefix_out_of_order_on_one_device": ({"data": 1}, 2, {"causal": True, "segments": True, "prefix": True}),
    "prefix": ({"context": 4}, 4, {"causal": True, "segments": True, "prefix": True}),
    "window_and_prefix": ({"context": 4}, None, {"causal": True, "segments": True, "prefix": True, "window": 9}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_in_parts_equal_whole_rows(name):
    shape, parts, features = CASES[name]
    knobs = {"scale": 0.3} | {key: features[key] for key in ("causal", "window", "soft_cap") if key in features}
    x = {key: z for key, z in tensors().items() if key != "weight" and (key != "sinks" or "sinks" in features)}
    segments_BT = SEGMENTS if "segments" in features else None
    prefix_BT = np.broadcast_to(PREFIX, (B, T)) if "prefix" in features else None
    places = np.arange(T) if parts is None else head_tail(T, parts)
    order_BT = None if parts is None else jnp.broadcast_to(places, (B, T))

    def expected(q, k, v, sinks_H):
        if prefix_BT is not None:  # the definition knows no prefix; this form is held against it elsewhere
            return kernels.attention(q, k, v, **knobs, segments_BT=jnp.asarray(segments_BT), prefix_BT=prefix_BT)
        return naive(q, k, v, **knobs, segments_BT=segments_BT, sinks_H=sinks_H)

    def attend(q, k, v, sinks_H):
        def moved(z):
            return None if z is None else jnp.asarray(z)[:, places]

        y = kernels.attention(
            moved(q),
            moved(k),
            moved(v),
            segments_BT=moved(segments_BT),
            sinks_H=sinks_H,
            prefix_BT=moved(prefix_BT),
            order_BT=order_BT,
            **knobs,
        )
        return y[:, np.argsort(places)]

    with kernels.choose("attention", "xla"):
        (_, y), gradients = differentiated(expected, x)(x)
    mesh = layout(**shape)
    with axes.place_with(mesh), kernels.choose("context_attention", "gather" if "gather" in features else "ring"):
        compiled = differentiated(attend, x).lower(x).compile()
    (_, got), got_gradients = compiled(x)
    real = np.ones((B, T), bool) if segments_BT is None else segments_BT > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(y)[real], atol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5), got_gradients, gradients)
    if name == "window":  # a query reaches over one cut: one hop there and one back
        permutes = [c for c in collectives(compiled.as_text(), mesh.mesh) if c.kind == "collective-permute"]
        assert {c.times for c in permutes if c.dtype == "f32"} == {1}


def test_parts_without_a_visible_pair_cost_nothing():
    """Values that are no number make every product with them none: where they are not seen they were not used."""
    x = tensors()
    v_BTGV = x["v"].at[:, 24:].set(jnp.nan)
    with axes.place_with(layout(context=4)):
        y = jax.jit(functools.partial(kernels.attention, scale=0.3, causal=True))(x["q"], x["k"], v_BTGV)
    assert bool(jnp.all(jnp.isfinite(y[:, :24]))) and bool(jnp.all(jnp.isnan(y[:, -1])))


MIXERS = {
    "mla": functools.partial(MLA, heads=4, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=3, rope=RoPE, kv_heads=2),
    "dual_chunk": functools.partial(
        DualChunk, heads=4, kv_heads=2, rope=RoPE, chunk=5, local=3, trained_length=8, logit_scale="once"
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_other_attention_in_parts_and_out_of_order(name):
    graph, params, _ = random_module(lambda rngs: MIXERS[name](16, rngs=rngs))
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, 16)), jnp.float32)
    starts = np.maximum.accumulate(np.where(np.diff(SEGMENTS, prepend=0) != 0, np.arange(T), 0), 1)
    ctx = Context(positions_BT=jnp.asarray(np.arange(T) - starts), segments_BT=jnp.asarray(SEGMENTS))

    def run(params, x_BTD, ctx):
        y_BTD = nnx.merge(graph, params)(x_BTD, ctx)[0]
        weight_BT1 = (ctx.segments_BT > 0)[..., None]
        return jnp.sum(jnp.sin(y_BTD) * weight_BT1), jnp.where(weight_BT1, y_BTD, 0.0)

    run = jax.value_and_grad(run, has_aux=True)
    (_, y_BTD), gradients = jax.jit(run)(params, x_BTD, ctx)
    places = head_tail(T, 4)
    moved = jax.tree.map(lambda z: z[:, places], ctx).replace(order_BT=jnp.broadcast_to(places, (B, T)))
    with axes.place_with(layout(context=4, data=2)):
        (_, got_BTD), got_gradients = jax.jit(lambda *args: run(*args))(params, x_BTD[:, places], moved)
    np.testing.assert_allclose(got_BTD, y_BTD[:, places], atol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-5, rtol=1e-5), got_gradients, gradients)


def test_a_mixer_that_cannot_is_refused():
    def call(mixer, ctx):
        def build():
            block = Block(16, mixer=mixer, ffn=None, norm=RMSNorm, rngs=nnx.Rngs(0))
            return block(jnp.zeros((B, T, 16)), ctx)

        with axes.place_with(layout(context=4)):
            jax.eval_shape(build)

    ctx = Context.of(jnp.zeros((B, T), jnp.int32))
    with pytest.raises(
        ValueError, match=r"Block.mixer=RelativeAttention cannot work on rows cut over the mesh axis conte"
    ):
        call(functools.partial(RelativeAttention, heads=2), ctx)
    shuffled = ctx.replace(order_BT=ctx.positions_BT)
    with pytest.raises(ValueError, match=r"Block.mixer=LightningAttention needs the tokens of a row in order"):
        call(functools.partial(LightningAttention, heads=2), shuffled)
    call(functools.partial(Attention, heads=2), shuffled)
