"""Normalisations over the last dimension; the reduction is in float32 whatever the input."""

import copy
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes


class RMSNorm(nnx.Module):
    """y = gain * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    x: [..., dim], any float dtype; y has the same shape and dtype.

    Knobs: gain: "channel", a learned gain for each channel; "scalar", one learned gain for all of them (the
    single-scale norm of arXiv 2506.19697); "none". eps > 0, inside the root.
    Refuses eps <= 0.
    """

    def __init__(
        self, dim: int, *, gain: Literal["channel", "scalar", "none"] = "channel", eps: float = 1e-6, rngs: nnx.Rngs
    ):
        if eps <= 0:
            raise ValueError(f"RMSNorm.eps={eps} must be positive, such as 1e-6")
        if gain not in ("channel", "scalar", "none"):
            raise ValueError(f"RMSNorm.gain={gain!r} must be 'channel', 'scalar' or 'none'")
        self.dim, self.eps = dim, eps
        shape = {"channel": (dim,), "scalar": ()}
        self.gain = (
            axes.param(rngs, shape[gain], ("norm",)[: len(shape[gain])], jax.nn.initializers.ones)
            if gain in shape
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        if self.gain is not None:
            y = y * self.gain[...].astype(jnp.float32)
        return y.astype(x.dtype)

    def merged(self) -> "RMSNorm":
        """The same norm with a gain for each channel in place of one for all (`layers.merging`): the form that other
        libraries know."""
        if self.gain is None or "norm" in self.gain.get_metadata("axes"):
            return self
        gain, norm = self.gain[...], copy.copy(self)
        axes_of = (*self.gain.get_metadata("axes"), "norm")
        norm.gain = self.gain.replace(jnp.broadcast_to(gain[..., None], (*gain.shape, self.dim)), axes=axes_of)
        return norm


class Identity(nnx.Module):
    """y = x, where a norm could stand: the first block of an encoder whose embedding is already normed (ModernBERT)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.dim = dim

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class LayerNorm(nnx.Module):
    """y = gain * (x - mean(x)) / sqrt(var(x) + eps) + bias (Ba et al. 2016, arXiv 1607.06450).

    x: [..., dim], any float dtype; y has the same shape and dtype.

    Knobs: bias, whether there is a learned offset; eps > 0.
    Refuses eps <= 0.
    """

    def __init__(self, dim: int, *, bias: bool = True, eps: float = 1e-5, rngs: nnx.Rngs):
        if eps <= 0:
            raise ValueError(f"LayerNorm.eps={eps} must be positive, such as 1e-5")
        self.eps = eps
        self.gain = axes.param(rngs, (dim,), ("norm",), jax.nn.initializers.ones)
        self.bias = axes.param(rngs, (dim,), ("norm",), jax.nn.initializers.zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        y = y * self.gain[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
