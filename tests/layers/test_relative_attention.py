"""T5's bias by distance, and cross-attention: who sees what of a source."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.context import Context, Source
from layers.relative_attention import CrossAttention, RelativeAttention, RelativeBias
from tests.reference.random import random_module

F = functools.partial
D, B, T = 16, 2, 12


def bucket_by_definition(distance, buckets, max_distance, bidirectional):
    """One distance at a time, as the paper words it."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        size = abs(distance)
    else:
        size = max(-distance, 0)
    single = buckets // 2
    if size < single:
        return offset + size
    share = np.float32(np.log(np.float32(size) / np.float32(single))) / np.float32(np.log(max_distance / single))
    return offset + min(single + int(np.float32(share) * np.float32(buckets - single)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 3)])
def test_the_bias_of_a_distance_is_its_buckets(buckets, max_distance, bidirectional):
    knobs = {"heads": 3, "buckets": buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    bias = nnx.merge(*random_module(lambda rngs: RelativeBias(rngs=rngs, **knobs))[:2])
    q, k = jnp.asarray([[0, 5, 300]]), jnp.arange(310)[None]  # distances far beyond max_distance on both sides
    got = bias(q, k)
    assert got.shape == (1, 3, 3, 310)
    for i, position in enumerate((0, 5, 300)):
        rows = [bucket_by_definition(j - position, buckets, max_distance, bidirectional) for j in range(310)]
        np.testing.assert_array_equal(got[0, :, i], bias.table[...][np.asarray(rows)].T)


def test_buckets_are_those_of_transformers():
    pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    import torch

    distances = np.arange(-700, 701)
    for buckets, max_distance in ((32, 128), (64, 256), (10, 37)):
        for bidirectional in (True, False):
            bias = RelativeBias(
                heads=1, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional,
                rngs=nnx.Rngs(params=0),
            )  # fmt: skip
            theirs = t5.T5Attention._relative_position_bucket(
                torch.from_numpy(distances), bidirectional, buckets, max_distance
            )
            np.testing.assert_array_equal(bias.bucket(distances), theirs.numpy())


def test_a_shared_bias_is_the_layers_own():
    own = F(RelativeBias, heads=4, buckets=8, max_distance=9, bidirectional=False)
    graph, params, _ = random_module(lambda rngs: RelativeAttention(D, heads=4, bias=own, rngs=rngs))
    with_bias = nnx.merge(graph, params)
    shared = RelativeAttention(D, heads=4, rngs=nnx.Rngs(params=0))
    for name in ("query", "key", "value", "out"):
        setattr(shared, name, getattr(with_bias, name))
    x_BTD, ctx = jax.random.normal(jax.random.key(0), (B, T, D)), Context.of(jnp.zeros((B, T)))
    index = jnp.arange(T)[None]
    got = shared(x_BTD, ctx.replace(bias_BHTS=with_bias.bias(index, index)))[0]
    np.testing.assert_allclose(got, with_bias(x_BTD, ctx)[0], atol=1e-6)
    with pytest.raises(ValueError, match="the network shares none"):
        shared(x_BTD, ctx)
    with pytest.raises(ValueError, match=r"RelativeBias.heads=2 must be RelativeAttention.heads=4"):
        shared(x_BTD, ctx.replace(bias_BHTS=jnp.zeros((1, 2, T, T))))


def test_cross_attention_by_its_definition():
    """Each target token against the source tokens of its segment, one at a time; a segment without source gives 0."""
    cross = nnx.merge(*random_module(lambda rngs: CrossAttention(D, heads=2, scale=0.7, rngs=rngs))[:2])
    S = 9
    x_BTD = jax.random.normal(jax.random.key(0), (1, T, D))
    memory_BSD = jax.random.normal(jax.random.key(1), (1, S, D))
    targets = np.asarray([1] * 4 + [2] * 4 + [3] * 2 + [0] * 2)
    sources = np.asarray([1] * 3 + [3] * 4 + [0] * 2)  # segment 2 has no source
    ctx = Context.of(jnp.zeros((1, T)), segments_BT=jnp.asarray(targets)[None], memory_BSD=memory_BSD)
    ctx = ctx.replace(source=Source(jnp.zeros((1, S), int), jnp.zeros((1, S), int), jnp.asarray(sources)[None]))
    got = cross(x_BTD, ctx)[0][0]
    q_THK, k_SHK, v_SHK = cross.query(x_BTD)[0], cross.key(memory_BSD)[0], cross.value(memory_BSD)[0]
    for t in range(10):
        seen = np.flatnonzero(sources == targets[t])
        y_HK = np.zeros((2, 8), np.float32)
        for h in range(2):
            if len(seen):
                weights = jax.nn.softmax(0.7 * k_SHK[seen, h] @ q_THK[t, h])
                y_HK[h] = weights @ v_SHK[seen, h]
        np.testing.assert_allclose(got[t], cross.out(jnp.asarray(y_HK)), atol=1e-5, err_msg=str(t))


def make(kind, **knobs):
    return kind(rngs=nnx.Rngs(params=0), **knobs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(RelativeBias, heads=0, bidirectional=True), r"RelativeBias.heads=0"),
        (lambda: make(RelativeBias, heads=1, buckets=5, bidirectional=True), r"RelativeBias.buckets=5"),
        (lambda: make(RelativeBias, heads=1, max_distance=8, bidirectional=True), r"RelativeBias.max_distance=8"),
        (lambda: make(RelativeBias, heads=1, std=0.0, bidirectional=True), r"RelativeBias.std=0.0"),
        (lambda: make(RelativeAttention, dim=D, heads=3), r"RelativeAttention.heads=3"),
        (lambda: make(RelativeAttention, dim=D, heads=2, scale=0.0), r"RelativeAttention.scale=0.0"),
        (lambda: make(RelativeAttention, dim=D, heads=2, causal=False).init_cache(1, 2, jnp.float32), "no cache"),
        (lambda: make(CrossAttention, dim=D, heads=0), r"CrossAttention.heads=0"),
        (lambda: make(CrossAttention, dim=D, heads=2, head_dim=0), r"CrossAttention.head_dim=0"),
        (
            lambda: make(CrossAttention, dim=D, heads=2)(jnp.zeros((1, 2, D)), Context.of(jnp.zeros((1, 2)))),
            "output of an encoder",
        ),
        (
            lambda: make(CrossAttention, dim=D, heads=2).extend(
                jnp.zeros((1, 2, D)), {}, Context.of(jnp.zeros((1, 2)))
            ),
            "no source in its cache",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
