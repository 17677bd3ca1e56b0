"""Experts that compute nothing, or almost: a token that needs less computation is sent there."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes


class ZeroExperts(nnx.Module):
    """`identity` experts return their input (LongCat-Flash, arXiv 2509.01322, eq. 2), `zero` experts nothing, and
    `constant` experts a learned vector mixed with the input, a x + (1 - a) v with a = sigmoid(x w) (MoE++, arXiv
    2410.07348, eq. 7: its softmax over two logits), in this order. None of them needs dispatch.

    Knobs: identity, zero, constant: how many of each, >= 0, at least one in all.
    """

    def __init__(self, dim: int, *, identity: int = 0, zero: int = 0, constant: int = 0, rngs: nnx.Rngs):
        for name, value in (("identity", identity), ("zero", zero), ("constant", constant)):
            if value < 0:
                raise ValueError(f"ZeroExperts.{name}={value} must not be negative")
        self.identity, self.count = identity, identity + zero + constant
        if self.count == 0:
            raise ValueError("ZeroExperts.identity, zero and constant are all 0: set MoE.zero_experts=None instead")
        self.constant, self.dim = constant, dim
        shape, names = (constant, dim), ("routed", "embed")
        self.vector = axes.param(rngs, shape, names) if constant else None
        self.mix = axes.param(rngs, shape, names) if constant else None

    def __call__(self, x_BTD: jax.Array, index_BTJ: jax.Array, weight_BTJ: jax.Array) -> jax.Array:
        """The weighted sum over the choices with an index in [0, count): [B, T, D]."""
        is_identity = (index_BTJ >= 0) & (index_BTJ < self.identity)
        keep_BT = jnp.sum(jnp.where(is_identity, weight_BTJ, 0.0), -1)
        y_BTD = jnp.zeros(x_BTD.shape, jnp.float32)
        if self.constant:
            which_BTJC = index_BTJ[..., None] - (self.count - self.constant) == jnp.arange(self.constant)
            weight_BTC = jnp.sum(jnp.where(which_BTJC, weight_BTJ[..., None], 0.0), -2)
            a_BTC = jax.nn.sigmoid((x_BTD @ self.mix[...].T).astype(jnp.float32))
            keep_BT = keep_BT + jnp.sum(weight_BTC * a_BTC, -1)
            y_BTD = (weight_BTC * (1 - a_BTC)) @ self.vector[...].astype(jnp.float32)
        return (y_BTD + keep_BT[..., None] * x_BTD).astype(x_BTD.dtype)

    @property
    def flops_per_token(self) -> float:
        """The constant experts' mixing logits and their vectors; the rest is not a matrix product."""
        return 4.0 * self.constant * self.dim
