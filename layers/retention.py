"""Retention: linear attention whose heads forget at fixed rates of their own (RetNet)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes, recurrence
from layers.cache import real
from layers.context import Context, CutsLength
from layers.linear import Linear
from layers.norm import RMSNorm
from layers.rope import RoPE, rotary
from layers.rope2d import RoPE2D

HEAD_NORM = functools.partial(RMSNorm, gain="none")


class Retention(nnx.Module, CutsLength):
    """Multi-scale retention (Sun et al. 2023, arXiv 2307.08621, section 2.3):

        q, k = rope(x W_q), rope(x W_k);   o_t = sum over s <= t of decay^(t - s) (q_t . k_s / sqrt(N)) v_s, a head
        y = (silu(x W_g) * norm(o)) W_o, the norm a head

    decay = 1 - 2^(-5 - i) for head i. Queries and keys have N = D / H channels a head, values and the gate
    K = value_ratio N. The paper's xPos is RoPE here: the decay does the rest.

    x and y: [B, T, D]. aux is empty. Tokens see only their own segment.

    Knobs: heads H >= 1, a divisor of D; value_ratio >= 1; rope: factory of a rotary embedding such as RoPE, or None;
        norm: factory of the norm over K; chunk >= 1 tokens a block, which changes the speed alone.
    Decoding: the cache is the state, float32 [H, N, K], whatever the length.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        value_ratio: int = 2,
        rope: Callable | None = RoPE,
        norm: Callable = HEAD_NORM,
        chunk: int = recurrence.CHUNK,
        rngs: nnx.Rngs,
    ):
        for name, value in (("heads", heads), ("value_ratio", value_ratio), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"Retention.{name}={value} must be at least 1")
        if dim % heads:
            raise ValueError(f"Retention.heads={heads} does not divide the width {dim}: use a divisor")
        H, N = heads, dim // heads
        K = value_ratio * N
        self.chunk, self.state_shape = chunk, (H, N, K)
        head_axes = ("heads", "head_dim")
        self.query = Linear((dim,), (H, N), ("embed",), head_axes, rngs=rngs)
        self.key = Linear((dim,), (H, N), ("embed",), head_axes, rngs=rngs)
        self.value = Linear((dim,), (H, K), ("embed",), head_axes, rngs=rngs)
        self.gate = Linear((dim,), (H, K), ("embed",), head_axes, rngs=rngs)
        self.rope = rotary("Retention", rope, N)
        if isinstance(self.rope, RoPE2D):
            raise ValueError(
                "Retention.rope=RoPE2D needs blocks of a filled-in blank, which it does not read: use RoPE"
            )
        self.norm = norm(K, rngs=rngs)
        self.out = Linear((H, K), (dim,), head_axes, ("embed",), rngs=rngs)

    def _mix(self, x_BTD, ctx: Context, **carried) -> tuple[jax.Array, jax.Array]:
        H, N, _ = self.state_shape
        q_BTHN, k_BTHN, v_BTHK = self.query(x_BTD) * N**-0.5, self.key(x_BTD), self.value(x_BTD)
        if self.rope is not None:
            q_BTHN, k_BTHN = self.rope(q_BTHN, ctx.positions_BT), self.rope(k_BTHN, ctx.positions_BT)
        q_BTHN, k_BTHN, v_BTHK = (
            axes.constrain(z, "batch", "length", "act_heads", None) for z in (q_BTHN, k_BTHN, v_BTHK)
        )
        log_decay_H = np.log1p(-(2.0 ** (-5.0 - np.arange(H)))).astype(np.float32)
        o_BTHK, state_BHNK = recurrence.recurrence(
            q_BTHN, k_BTHN, v_BTHK, log_decay=log_decay_H, chunk=self.chunk, **carried
        )
        return self.out(jax.nn.silu(self.gate(x_BTD)) * self.norm(o_BTHK)), state_BHNK

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self._mix(x_BTD, ctx, segments_BT=ctx.segments_BT)[0], {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state of rows of any length."""
        return {"state": jnp.zeros((batch, *self.state_shape), jnp.float32)}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; padding leaves the state alone."""
        y_BTD, state_BHNK = self._mix(x_BTD, ctx, initial_BHNK=cache["state"], real_BT=real(ctx))
        return y_BTD, {"state": state_BHNK}

    def flops_per_token(self, length: int) -> float:
        """Projections and the recurrence."""
        H, N, K = self.state_shape
        parts = (self.query, self.key, self.value, self.gate, self.out)
        mixing = recurrence.flops_per_token(length, heads=H, state=N, value=K)
        return math.fsum(part.flops_per_token() for part in parts) + mixing
