"""RMSNorm of a mixer's output together with its gate."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes


class GatedRMSNorm(nnx.Module):
    """gain * rms(y * silu(z)), or gain * rms(y) * silu(z) with norm_before_gate; rms(a) = a / sqrt(mean(a^2) + eps).

    y, z and the result: [..., dim], dtype of y; all of it in float32 inside. The mean runs over each of `groups` equal
    parts of dim, so that heads on different devices need not meet (Mamba-2, arXiv 2405.21060, section 8.1).

    Knobs: groups >= 1, a divisor of dim; norm_before_gate: Mamba-2 gates first, gated DeltaNet norms first; eps > 0.
    Refuses groups that do not divide dim and eps <= 0.
    """

    def __init__(self, dim: int, *, groups: int = 1, norm_before_gate: bool = False, eps: float = 1e-5, rngs: nnx.Rngs):
        if groups < 1 or dim % groups:
            raise ValueError(f"GatedRMSNorm.groups={groups} must divide the width {dim}: use a divisor, or 1")
        if eps <= 0:
            raise ValueError(f"GatedRMSNorm.eps={eps} must be positive, such as 1e-5")
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.gain = axes.param(rngs, (dim,), ("norm",), jax.nn.initializers.ones)

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        gate = jax.nn.silu(z.astype(jnp.float32))
        a = y.astype(jnp.float32)
        if not self.norm_before_gate:
            a = a * gate
        parts = jnp.reshape(a, (*a.shape[:-1], self.groups, -1))
        parts = parts * jax.lax.rsqrt(jnp.mean(jnp.square(parts), -1, keepdims=True) + self.eps)
        a = jnp.reshape(parts, a.shape) * self.gain[...].astype(jnp.float32)
        if self.norm_before_gate:
            a = a * gate
        return a.astype(y.dtype)
