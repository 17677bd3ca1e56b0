"""Gated linear attention: a state whose every key channel forgets by a gate of the data (GLA)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, recurrence
from layers.cache import real
from layers.context import Context, CutsLength
from layers.linear import Linear
from layers.norm import RMSNorm


class GatedLinearAttention(nnx.Module, CutsLength):
    """GLA (Yang et al. 2023, arXiv 2312.06635, section 4):

        log decay_t = log sigmoid(x_t W_1 W_2 + b) / temperature, a channel of the key
        S_t = diag(decay_t) S_{t-1} + k_t v_t^T;   o_t = S_t^T q_t / sqrt(N);   y = (silu(x W_g) * norm(o)) W_o

    Queries and keys are D / 2 wide, N = D / (2 H) a head; values and the gate D, K = D / H a head; the norm is a head.

    x and y: [B, T, D]. aux is empty. Tokens see only their own segment.

    Knobs: heads H >= 1; key_ratio > 0, the width of queries and keys in units of D; rank >= 1 of W_1 W_2; temperature
        > 0: larger forgets more slowly; norm: factory of the norm over K; chunk >= 1 tokens a block, rounded up to a
        power of two: speed alone.
    Decoding: the cache is the state, float32 [H, N, K], whatever the length.
    Refuses heads that do not divide the width of the keys or of the values.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        key_ratio: float = 0.5,
        rank: int = 16,
        temperature: float = 16.0,
        norm: Callable = RMSNorm,
        chunk: int = recurrence.CHUNK,
        rngs: nnx.Rngs,
    ):
        for name, value in (("heads", heads), ("rank", rank), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"GatedLinearAttention.{name}={value} must be at least 1")
        for name, value in (("key_ratio", key_ratio), ("temperature", temperature)):
            if value <= 0:
                raise ValueError(f"GatedLinearAttention.{name}={value} must be positive")
        width = key_ratio * dim
        if dim % heads or width != int(width) or int(width) % heads:
            raise ValueError(
                f"GatedLinearAttention.heads={heads} does not divide the width {dim} of the values and {width} "
                "(key_ratio of it) of the keys: change one of them"
            )
        H, N, K = heads, int(width) // heads, dim // heads
        self.chunk, self.temperature, self.state_shape = chunk, temperature, (H, N, K)
        head_axes = ("heads", "head_dim")
        self.query = Linear((dim,), (H, N), ("embed",), head_axes, rngs=rngs)
        self.key = Linear((dim,), (H, N), ("embed",), head_axes, rngs=rngs)
        self.value = Linear((dim,), (H, K), ("embed",), head_axes, rngs=rngs)
        self.gate = Linear((dim,), (H, K), ("embed",), head_axes, rngs=rngs)
        self.decay_in = Linear((dim,), (rank,), ("embed",), ("latent",), rngs=rngs)
        self.decay_out = Linear((rank,), (H, N), ("latent",), head_axes, bias=True, rngs=rngs)
        self.norm = norm(K, rngs=rngs)
        self.out = Linear((H, K), (dim,), head_axes, ("embed",), rngs=rngs)

    def _mix(self, x_BTD, **carried) -> tuple[jax.Array, jax.Array]:
        q_BTHN, k_BTHN, v_BTHK = self.query(x_BTD) * self.state_shape[1] ** -0.5, self.key(x_BTD), self.value(x_BTD)
        decay_BTHN = self.decay_out(self.decay_in(x_BTD)).astype(jnp.float32)
        q_BTHN, k_BTHN, v_BTHK, decay_BTHN = (
            axes.constrain(z, "batch", "length", "act_heads", None) for z in (q_BTHN, k_BTHN, v_BTHK, decay_BTHN)
        )
        log_decay_BTHN = jax.nn.log_sigmoid(decay_BTHN) / self.temperature
        o_BTHK, state_BHNK = recurrence.recurrence(
            q_BTHN, k_BTHN, v_BTHK, log_decay=log_decay_BTHN, chunk=self.chunk, **carried
        )
        return self.out(jax.nn.silu(self.gate(x_BTD)) * self.norm(o_BTHK)), state_BHNK

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self._mix(x_BTD, segments_BT=ctx.segments_BT)[0], {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state of rows of any length."""
        return {"state": jnp.zeros((batch, *self.state_shape), jnp.float32)}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; padding leaves the state alone."""
        y_BTD, state_BHNK = self._mix(x_BTD, initial_BHNK=cache["state"], real_BT=real(ctx))
        return y_BTD, {"state": state_BHNK}

    def flops_per_token(self, length: int) -> float:
        """Projections and the recurrence."""
        H, N, K = self.state_shape
        parts = (self.query, self.key, self.value, self.gate, self.decay_in, self.decay_out, self.out)
        mixing = recurrence.flops_per_token(length, heads=H, state=N, value=K)
        return math.fsum(part.flops_per_token() for part in parts) + mixing
