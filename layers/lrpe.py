"""LRPE: the relative position embedding of linear attention, which doubles the width of queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes


class LRPE(nnx.Module):
    """a_t -> concat(a_t cos(theta t), a_t sin(theta t)), theta learned for each channel of each head (TransNormerLLM,
    arXiv 2307.14995, section 3.1.1).

    So the product of a query at t and a key at s is sum_j q_j k_j cos(theta_j (t - s)): each channel turns alone, where
    RoPE turns pairs of channels. Called with a [B, T, H, K] and positions_BT it returns [B, T, H, 2K], same dtype.
    theta starts at base^(-2 j / (H K)), j the index of the channel over all heads. Learned is the offset from there,
    so that in low precision the angles of late positions stay right.

    Knobs: base > 0.
    """

    def __init__(self, heads: int, head_dim: int, *, base: float = 10000.0, rngs: nnx.Rngs):
        if base <= 0:
            raise ValueError(f"LRPE.base={base} must be positive, such as 10000")
        self.base = base
        self.offset = axes.param(rngs, (heads, head_dim), ("heads", "head_dim"), jax.nn.initializers.zeros, exact=True)

    def theta(self) -> jax.Array:
        """Radians a position, float32 [H, K]."""
        H, K = self.offset.shape
        start = self.base ** (-2.0 * np.arange(H * K) / (H * K))
        return jnp.asarray(start.reshape(H, K), jnp.float32) + self.offset[...].astype(jnp.float32)

    def __call__(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * self.theta()
        cos, sin = jnp.cos(angle).astype(x_BTHK.dtype), jnp.sin(angle).astype(x_BTHK.dtype)
        return jnp.concatenate([x_BTHK * cos, x_BTHK * sin], -1)
