"""Norms against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.norm import LayerNorm, RMSNorm

X = np.random.default_rng(0).normal(2.0, 3.0, (4, 8)).astype(np.float32)


@pytest.mark.parametrize("gain", ["channel", "scalar", "none"])
def test_rms_norm(gain):
    norm = RMSNorm(8, gain=gain, eps=0.1, rngs=nnx.Rngs(params=0))
    factor = {"channel": np.arange(1.0, 9.0), "scalar": np.float32(3.0), "none": 1.0}[gain]
    if gain != "none":
        norm.gain[...] = jnp.asarray(factor, jnp.float32)
        assert len(norm.gain.get_metadata("axes")) == np.ndim(factor)
    np.testing.assert_allclose(norm(X), factor * X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.1), rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    norm = LayerNorm(8, bias=bias, eps=0.1, rngs=nnx.Rngs(params=0))
    norm.gain[...] = jnp.arange(1.0, 9.0)
    offset = np.zeros(8)
    if bias:
        offset = np.arange(8.0)
        norm.bias[...] = jnp.asarray(offset)
    expected = np.arange(1.0, 9.0) * (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 0.1) + offset
    np.testing.assert_allclose(norm(X), expected, rtol=1e-4, atol=1e-5)


def test_the_reduction_is_in_float32():
    x = jnp.full((1, 4096), 200.0, jnp.float16)  # the square of 200 summed in float16 is infinite
    y = RMSNorm(4096, rngs=nnx.Rngs(params=0))(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 1.0, atol=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match=r"RMSNorm.eps=0"):
        RMSNorm(8, eps=0, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"RMSNorm.gain='row'"):
        RMSNorm(8, gain="row", rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"LayerNorm.eps=-1"):
        LayerNorm(8, eps=-1, rngs=nnx.Rngs(params=0))
