"""DeltaNet: linear attention whose state corrects what it answers to a key instead of adding to it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, recurrence
from layers.cache import real
from layers.context import Context, CutsLength
from layers.conv import ShortConv
from layers.linear import Linear
from layers.norm import RMSNorm


class DeltaNet(nnx.Module, CutsLength):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484):

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v));   q, k of length 1;   beta = sigmoid(x W_b)
        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T;   o_t = S_t^T q_t / sqrt(K);   y = norm(o) W_o, a head

    x and y: [B, T, D]. aux is empty. Tokens see only their own segment, in the convolution too.

    Knobs: heads H >= 1, a divisor of D; conv_width >= 1 tokens; norm: factory of the norm over K = D / H; chunk >= 1
        tokens a block, which changes the speed alone.
    Decoding: the cache is the state, float32 [H, K, K], and the last conv_width - 1 inputs of the convolutions.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        conv_width: int = 4,
        norm: Callable = RMSNorm,
        chunk: int = recurrence.CHUNK,
        rngs: nnx.Rngs,
    ):
        for name, value in (("heads", heads), ("conv_width", conv_width), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"DeltaNet.{name}={value} must be at least 1")
        if dim % heads:
            raise ValueError(f"DeltaNet.heads={heads} does not divide the width {dim}: use a divisor")
        H, K = heads, dim // heads
        self.chunk, self.heads, self.head_dim = chunk, H, K
        head_axes = ("heads", "head_dim")
        project = functools.partial(Linear, (dim,), (H, K), ("embed",), head_axes, rngs=rngs)
        self.query, self.key, self.value = project(), project(), project()
        convolve = functools.partial(ShortConv, (H, K), head_axes, width=conv_width, bias=False, rngs=rngs)
        self.query_conv, self.key_conv, self.value_conv = convolve(), convolve(), convolve()
        self.beta = Linear((dim,), (H,), ("embed",), ("heads",), rngs=rngs)
        self.norm = norm(K, rngs=rngs)
        self.out = Linear((H, K), (dim,), head_axes, ("embed",), rngs=rngs)

    def _mix(self, x_BTD, q_BTHK, k_BTHK, v_BTHK, **carried) -> tuple[jax.Array, jax.Array]:
        """Everything behind the convolutions."""
        q_BTHK, k_BTHK = _unit(jax.nn.silu(q_BTHK)) * self.head_dim**-0.5, _unit(jax.nn.silu(k_BTHK))
        q_BTHK, k_BTHK, v_BTHK = (
            axes.constrain(z, "batch", "length", "act_heads", None) for z in (q_BTHK, k_BTHK, jax.nn.silu(v_BTHK))
        )
        beta_BTH = jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        o_BTHK, state_BHKK = recurrence.recurrence(
            q_BTHK, k_BTHK, v_BTHK, log_decay=None, beta_BTH=beta_BTH, chunk=self.chunk, **carried
        )
        return self.out(self.norm(o_BTHK)), state_BHKK

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        q_BTHK = self.query_conv(self.query(x_BTD), ctx.segments_BT)
        k_BTHK = self.key_conv(self.key(x_BTD), ctx.segments_BT)
        v_BTHK = self.value_conv(self.value(x_BTD), ctx.segments_BT)
        return self._mix(x_BTD, q_BTHK, k_BTHK, v_BTHK, segments_BT=ctx.segments_BT)[0], {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state and the convolutions' tails of rows of any length."""
        tails = {"query": self.query_conv, "key": self.key_conv, "value": self.value_conv}
        return {
            "state": jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32),
            "tail": {name: conv.init_cache(batch, dtype) for name, conv in tails.items()},
        }

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; padding changes nothing of the cache."""
        B, T = x_BTD.shape[:2]
        lengths_B = jnp.full(B, T) if ctx.lengths_B is None else ctx.lengths_B
        tail = cache["tail"]
        q_BTHK, tail_q = self.query_conv.extend(self.query(x_BTD), tail["query"], lengths_B)
        k_BTHK, tail_k = self.key_conv.extend(self.key(x_BTD), tail["key"], lengths_B)
        v_BTHK, tail_v = self.value_conv.extend(self.value(x_BTD), tail["value"], lengths_B)
        y_BTD, state = self._mix(x_BTD, q_BTHK, k_BTHK, v_BTHK, initial_BHNK=cache["state"], real_BT=real(ctx))
        return y_BTD, {"state": state, "tail": {"query": tail_q, "key": tail_k, "value": tail_v}}

    def flops_per_token(self, length: int) -> float:
        """Projections, convolutions, and the recurrence token by token: the state read for the correction and the
        output, and written."""
        projections = (self.query, self.key, self.value, self.beta, self.out)
        convolutions = (self.query_conv, self.key_conv, self.value_conv)
        mixing = 6.0 * self.heads * self.head_dim**2
        return sum(part.flops_per_token() for part in (*projections, *convolutions)) + mixing


def _unit(x: jax.Array) -> jax.Array:
    """x of length 1 along its last dimension, the length in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), -1, keepdims=True) + 1e-6)).astype(x.dtype)
