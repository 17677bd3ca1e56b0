"""Normalisation of queries and keys with a gain and an offset for each head."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes


class HeadNorm(nnx.Module):
    """LayerNorm over head_dim whose gain and offset are each head's own: the query-key norm of Chameleon (arXiv
    2405.09818, section 2.3). A factory for Attention.qk_norm.

    x: [..., H, K], any float dtype; y has the same shape and dtype; the reduction is in float32.

    Knobs: heads H >= 1, those of Attention (queries and keys alike, so Attention.kv_heads must be None or equal to it);
    eps > 0.
    Refuses another number of heads in the input.
    """

    def __init__(self, dim: int, *, heads: int, eps: float = 1e-5, rngs: nnx.Rngs):
        if heads < 1:
            raise ValueError(f"HeadNorm.heads={heads} must be at least 1")
        if eps <= 0:
            raise ValueError(f"HeadNorm.eps={eps} must be positive, such as 1e-5")
        self.heads, self.eps = heads, eps
        self.gain = axes.param(rngs, (heads, dim), ("heads", "norm"), jax.nn.initializers.ones)
        self.bias = axes.param(rngs, (heads, dim), ("heads", "norm"), jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-2] != self.heads:
            raise ValueError(
                f"HeadNorm.heads={self.heads} does not fit {x.shape[-2]} heads: set it to Attention.heads, and "
                "Attention.kv_heads to None"
            )
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (y * self.gain[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
