"""Dual chunk attention against its definition and against plain attention, where they must agree."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import kernels
from layers.attention import Attention
from layers.context import Context
from layers.dual_chunk import DualChunk
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.rope2d import RoPE2D
from tests.reference import dual_chunk as naive
from tests.reference.random import random_module

F = functools.partial
D, H, G, K, T, CHUNK, LOCAL, TRAINED = 16, 4, 2, 8, 24, 5, 3, 10
HEADS = {"heads": H, "kv_heads": G, "head_dim": K, "rope": RoPE}
KNOBS = HEADS | {"chunk": CHUNK, "local": LOCAL, "trained_length": TRAINED}


def parts(make):
    graph, params, _ = random_module(lambda rngs: make(rngs=rngs))
    return graph, params


def outputs(make, params, x_BTD, ctx=None):
    graph, _ = parts(make)
    return jax.jit(lambda p, x: nnx.merge(graph, p)(x, ctx or Context.of(x[..., 0]))[0])(params, x_BTD)


@pytest.fixture(scope="module")
def x_BTD():
    return jax.random.normal(jax.random.key(0), (2, T, D))


def test_distances_of_the_paper():
    assert [naive.distance(10, j, 5, 3) for j in range(11)] == [7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0]
    module = nnx.merge(*parts(F(DualChunk, D, **KNOBS)))
    places = [np.asarray(p)[0] for p in module.query_positions(jnp.arange(T)[None])]
    for i in range(T):
        for j in range(i + 1):
            place = places[min(i // CHUNK - j // CHUNK, 2)][i]
            assert place - j % CHUNK == naive.distance(i, j, CHUNK, LOCAL) < CHUNK + LOCAL
            if i - j < LOCAL:
                assert place - j % CHUNK == i - j


@pytest.mark.parametrize("logit_scale", ["none", "once", "yarn_sq"])
def test_equals_its_definition(x_BTD, logit_scale):
    make = F(DualChunk, D, **KNOBS, qkv_bias=True, qk_norm=RMSNorm, logit_scale=logit_scale)
    graph, params = parts(make)
    module, x_1TD, power = nnx.merge(graph, params), x_BTD[:1], {"none": 0, "once": 1, "yarn_sq": 2}[logit_scale]
    q, k = module.query_norm(module.query(x_1TD)), module.key_norm(module.key(x_1TD))
    frequencies = 10000.0 ** (-np.arange(0, K, 2) / K)

    def rotate(head_K, n):
        z = (head_K[: K // 2] + 1j * head_K[K // 2 :]) * np.exp(1j * n * frequencies)
        return np.concatenate([z.real, z.imag])

    y_THK = naive.attention(
        *(np.asarray(z, np.float64)[0] for z in (q, k, module.value(x_1TD))),
        chunk=CHUNK, local=LOCAL, scale=K**-0.5, rotate=rotate,
        temperature=lambda i: (max(0.0, 0.1 * math.log((i + 1) / TRAINED)) + 1) ** power,
    )  # fmt: skip
    expected = module.out(jnp.asarray(y_THK, jnp.float32)[None])
    np.testing.assert_allclose(outputs(make, params, x_1TD), expected, atol=2e-5)


def test_a_row_within_the_trained_range_is_ordinary_attention(x_BTD):
    plain, chunked = F(Attention, D, **HEADS), F(DualChunk, D, **HEADS, chunk=16, local=8, trained_length=T)
    params = parts(plain)[1]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parts(chunked)[1])
    expected = outputs(plain, params, x_BTD)
    np.testing.assert_allclose(outputs(chunked, params, x_BTD), expected, atol=1e-5)
    # One token more than chunk + local differs, so the identity above is no accident of the weights.
    less = F(DualChunk, D, **HEADS, chunk=15, local=8, trained_length=T)
    y = outputs(less, params, x_BTD)
    np.testing.assert_allclose(y[:, :-1], expected[:, :-1], atol=1e-5)
    assert jnp.abs(y[:, -1] - expected[:, -1]).max() > 1e-3


def test_a_row_that_starts_late_in_its_document(x_BTD):
    # All positions move by whole chunks: nothing changes, though the first chunk met is not the document's first.
    make = F(DualChunk, D, **KNOBS)
    ctx = Context.of(x_BTD[..., 0])
    params = parts(make)[1]
    moved = ctx.replace(positions_BT=ctx.positions_BT + 7 * CHUNK)
    np.testing.assert_allclose(outputs(make, params, x_BTD, moved), outputs(make, params, x_BTD), atol=1e-5)
    short = ctx.replace(positions_BT=jnp.arange(3, 7)[None])  # 4 tokens, fewer than a chunk, across a border
    whole = ctx.replace(segments_BT=jnp.asarray((np.arange(T) >= 3) & (np.arange(T) < 7), jnp.int32)[None])
    expected = outputs(make, params, x_BTD, whole)[:, 3:7]
    np.testing.assert_allclose(outputs(make, params, x_BTD[:, 3:7], short), expected, atol=1e-5)


def test_a_long_row_goes_by_chunks_of_queries(x_BTD, monkeypatch):
    monkeypatch.setattr("layers.dual_chunk.QUERIES", 7)
    make = F(DualChunk, D, **KNOBS)
    graph, params = parts(make)
    segments_BT = jnp.broadcast_to(jnp.where(jnp.arange(T) < 13, 1, 2), (2, T))
    ctx = Context.of(x_BTD[..., 0], segments_BT=segments_BT)

    def gradient(implementation):
        with kernels.choose("dual_chunk", implementation):
            return jax.jit(jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p)(x_BTD, ctx)[0] ** 2)))(params)

    jax.tree.map(F(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), gradient("chunked"), gradient("whole"))


def test_tokens_that_skip_positions(x_BTD):
    # What a layer that gets only some tokens of a row sees: chunks go by position, cache slots by count.
    make, kept = F(DualChunk, D, **KNOBS), np.flatnonzero(np.random.default_rng(0).random(T) < 0.4)
    graph, params = parts(make)
    module, positions_BT = nnx.merge(graph, params), jnp.broadcast_to(jnp.asarray(kept), (2, len(kept)))
    ctx = Context.of(x_BTD[..., 0])
    # The others as documents of their own: invisible, at their places.
    segments_BT = jnp.where(jnp.isin(jnp.arange(T), kept), 1, jnp.arange(T) + 2)[None].repeat(2, 0)
    expected = outputs(make, params, x_BTD, ctx.replace(segments_BT=segments_BT))[:, kept]
    some_BTD, whole = x_BTD[:, kept], Context(positions_BT, None)
    np.testing.assert_allclose(outputs(make, params, some_BTD, whole), expected, atol=1e-5)
    cache, out, extend = module.init_cache(2, len(kept), jnp.float32), [], jax.jit(module.extend)
    for part in (slice(0, 4), slice(4, None)):
        slots_BT = jnp.arange(len(kept))[None, part].repeat(2, 0)
        ctx = Context(positions_BT[:, part], None, jnp.full(2, slots_BT.shape[1]), slots_BT=slots_BT)
        y_BTD, cache = extend(some_BTD[:, part], cache, ctx)
        out.append(y_BTD)
    np.testing.assert_allclose(jnp.concatenate(out, 1), expected, atol=1e-5)


def test_refuses_a_prefix(x_BTD):
    ctx = Context.of(x_BTD[..., 0], prefix_BT=jnp.arange(T)[None].repeat(2, 0) < 4)
    with pytest.raises(ValueError, match="DualChunk has no distance for a prefix"):
        nnx.merge(*parts(F(DualChunk, D, **KNOBS)))(x_BTD, ctx)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"chunk": 0}, "DualChunk.chunk=0 must be at least 1"),
        ({"local": 0}, "DualChunk.local=0 must lie between 1 and chunk=5"),
        ({"local": 6}, "DualChunk.local=6 must lie between 1 and chunk=5"),
        ({"trained_length": 7}, "exceeds trained_length=7"),
        ({"rope": RoPE2D}, "DualChunk.rope=RoPE2D"),
        ({"logit_scale": "twice"}, "DualChunk.logit_scale='twice'"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: DualChunk(D, **(KNOBS | knobs), rngs=nnx.Rngs(params=0)))
