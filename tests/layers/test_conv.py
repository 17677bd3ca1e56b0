"""The short convolution against its definition, over packed rows and while decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.conv import ShortConv
from tests.reference.mamba2 import convolution
from tests.reference.random import random_module

B, T, CHANNELS = 3, 13, (2, 3)
SEGMENTS_BT = np.array(
    [[1] * 13, [1] * 1 + [2] * 2 + [3] * 5 + [4] * 5, [0] * 2 + [1] * 6 + [2] * 1 + [3] * 2 + [0] * 2], np.int32
)
X = np.random.default_rng(1).standard_normal((B, T, *CHANNELS)).astype(np.float32)


@functools.cache
def conv(width: int, bias: bool = True):
    graph, params, _ = random_module(
        lambda rngs: ShortConv(CHANNELS, ("heads", "head_dim"), width=width, bias=bias, rngs=rngs)
    )
    return nnx.merge(graph, params), params


def expected(params, segments_BT=None):
    """The definition, row by row."""
    kernel = params["kernel"].reshape(len(params["kernel"]), -1)
    bias = params["bias"].reshape(-1) if "bias" in params else None
    rows = [
        convolution(X[b].reshape(T, -1), kernel, bias, None if segments_BT is None else segments_BT[b])
        for b in range(B)
    ]
    return np.stack(rows).reshape(X.shape)


@pytest.mark.parametrize(("width", "bias"), [(1, True), (2, False), (4, True), (20, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_definition(width, bias, packed):
    layer, params = conv(width, bias)
    got = layer(jnp.asarray(X), jnp.asarray(SEGMENTS_BT) if packed else None)
    np.testing.assert_allclose(got, expected(params, SEGMENTS_BT if packed else None), atol=2e-6)


def test_no_gradient_crosses_a_boundary():
    layer, _ = conv(4)
    cut = 8  # row 1: its third document ends here

    def later(x):
        return jnp.sum(layer(x, jnp.asarray(SEGMENTS_BT))[1, cut:] ** 2)

    gradient = np.asarray(jax.grad(later)(jnp.asarray(X)))
    assert np.all(gradient[1, :cut] == 0) and np.all(gradient[1, cut:] != 0)


@pytest.mark.parametrize("width", [1, 4])
def test_ragged_extension_equals_the_whole_row(width):
    layer, params = conv(width)
    whole = expected(params)
    tail, at_B = layer.init_cache(B, jnp.float32), np.zeros(B, int)
    for lengths_B in [(0, 2, 5), (1, 0, 5), (1, 1, 1), (5, 3, 2)]:
        x = np.full((B, 5, *CHANNELS), np.nan, np.float32)  # padding that shows wherever it goes
        for row, n in enumerate(lengths_B):
            x[row, :n] = X[row, at_B[row] : at_B[row] + n]
        y, tail = layer.extend(jnp.asarray(x), tail, jnp.asarray(lengths_B))
        for row, n in enumerate(lengths_B):
            np.testing.assert_allclose(y[row, :n], whole[row, at_B[row] : at_B[row] + n], atol=2e-6)
        at_B += lengths_B
    for row, n in enumerate(at_B):
        np.testing.assert_array_equal(tail[row], X[row, n - (width - 1) : n])


def test_the_sum_is_in_float32():
    layer, _ = conv(4)
    low = jnp.asarray(X, jnp.bfloat16)
    exact = layer(low.astype(jnp.float32))
    got = layer(low)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_initial_values_are_uniform_in_the_fan_in():
    layer = ShortConv((64, 64), ("heads", "head_dim"), rngs=nnx.Rngs(params=0))
    for values in (layer.kernel[...], layer.bias[...]):
        assert float(jnp.abs(values).max()) <= 0.5
        np.testing.assert_allclose(float(values.std()), 0.5 / np.sqrt(3), rtol=0.02)


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match=r"ShortConv\.width=0"):
        ShortConv(CHANNELS, ("heads", "head_dim"), width=0, rngs=nnx.Rngs(params=0))
