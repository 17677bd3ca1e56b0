"""Gated DeltaNet: linear attention whose state forgets by a gate and is corrected by the delta rule."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.cache import real
from layers.context import Context, CutsLength
from layers.conv import ShortConv
from layers.gated_norm import GatedRMSNorm
from layers.linear import Linear
from layers.recurrence import recurrence

HEAD_NORM = functools.partial(GatedRMSNorm, norm_before_gate=True, eps=1e-6)


class GatedDeltaNet(nnx.Module, CutsLength):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), in the layout of Qwen3-Next:

        q, k, v = silu(conv(x W_q, x W_k, x W_v));   q = l2(q) / sqrt(N);   k = l2(k);   l2(a) = a / sqrt(|a|^2 + 1e-6)
        decay = exp(-exp(A_log) softplus(x W_a + dt_bias));   beta = sigmoid(x W_b)
        S_t = decay_t S_{t-1} + beta_t k_t (v_t - decay_t S_{t-1}^T k_t)^T;   y_t = S_t^T q_t
        out = W_out norm(y, z = x W_z), the norm a head

    x and out: [B, T, D]; q and k have G heads of N channels, v, z and y H heads of K; the state S is [H, N, K]. aux is
    empty. Decays, states and norms are in float32. Tokens of different segments share neither state nor convolution.

    Knobs: heads H >= 1 of values; key_heads G of queries and keys, a divisor of H, None for H; key_dim N and value_dim
        K >= 1; conv_width >= 1 tokens; chunk >= 1 tokens a block of the matrix form, which changes the speed alone;
        norm: factory of the gated norm over K.
    Decoding: the cache is the state in float32 and the last conv_width - 1 inputs of the convolution, whatever the
        length of the row.
    Refuses key_heads that do not divide heads, and sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        key_heads: int | None = None,
        key_dim: int = 128,
        value_dim: int = 128,
        conv_width: int = 4,
        chunk: int = 64,
        norm: Callable = HEAD_NORM,
        rngs: nnx.Rngs,
    ):
        H, G, N, K = heads, heads if key_heads is None else key_heads, key_dim, value_dim
        if H < 1 or G < 1 or H % G:
            raise ValueError(
                f"GatedDeltaNet.key_heads={key_heads} does not divide heads={heads}: use a divisor, or None for heads"
            )
        for name, value in (("key_dim", N), ("value_dim", K), ("conv_width", conv_width), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"GatedDeltaNet.{name}={value} must be at least 1")
        self.heads, self.chunk, self.state_shape = H, chunk, (H, N, K)
        key_axes, value_axes = ("kv_heads", "head_dim"), ("heads", "head_dim")
        self.query = Linear((dim,), (G, N), ("embed",), key_axes, rngs=rngs)
        self.key = Linear((dim,), (G, N), ("embed",), key_axes, rngs=rngs)
        self.value = Linear((dim,), (H, K), ("embed",), value_axes, rngs=rngs)
        self.gate = Linear((dim,), (H, K), ("embed",), value_axes, rngs=rngs)
        self.beta = Linear((dim,), (H,), ("embed",), ("heads",), rngs=rngs)
        self.decay = Linear((dim,), (H,), ("embed",), ("heads",), rngs=rngs)
        self.query_conv = ShortConv((G, N), key_axes, width=conv_width, bias=False, rngs=rngs)
        self.key_conv = ShortConv((G, N), key_axes, width=conv_width, bias=False, rngs=rngs)
        self.value_conv = ShortConv((H, K), value_axes, width=conv_width, bias=False, rngs=rngs)
        self.dt_bias = axes.param(rngs, (H,), ("heads",), jax.nn.initializers.ones, exact=True)
        self.A_log = axes.param(rngs, (H,), ("heads",), _log_decay, exact=True)
        self.norm = norm(K, rngs=rngs)
        self.out = Linear((H, K), (dim,), value_axes, ("embed",), rngs=rngs)

    def _mix(self, x_BTD, q_BTGN, k_BTGN, v_BTHK, **carried) -> tuple[jax.Array, jax.Array]:
        """Everything behind the convolution: the output and the state at the end of the row."""
        q_BTGN = _unit(jax.nn.silu(q_BTGN)) * q_BTGN.shape[-1] ** -0.5
        k_BTGN, v_BTHK = _unit(jax.nn.silu(k_BTGN)), jax.nn.silu(v_BTHK)
        v_BTHK = axes.constrain(v_BTHK, "batch", "length", "act_heads", None)
        step_BTH = jax.nn.softplus(self.decay(x_BTD).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        y_BTHK, state_BHNK = recurrence(
            q_BTGN.astype(x_BTD.dtype),
            k_BTGN.astype(x_BTD.dtype),
            v_BTHK,
            log_decay=-jnp.exp(self.A_log[...].astype(jnp.float32)) * step_BTH,
            beta_BTH=jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)),
            chunk=self.chunk,
            **carried,
        )
        return self.out(self.norm(y_BTHK.astype(x_BTD.dtype), self.gate(x_BTD))), state_BHNK

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        segments_BT = ctx.segments_BT
        q_BTGN = self.query_conv(self.query(x_BTD), segments_BT)
        k_BTGN = self.key_conv(self.key(x_BTD), segments_BT)
        v_BTHK = self.value_conv(self.value(x_BTD), segments_BT)
        return self._mix(x_BTD, q_BTGN, k_BTGN, v_BTHK, segments_BT=segments_BT)[0], {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state and the convolution's tails of rows of any length."""
        tails = {"query": self.query_conv, "key": self.key_conv, "value": self.value_conv}
        return {
            "state": jnp.zeros((batch, *self.state_shape), jnp.float32),
            "tail": {name: conv.init_cache(batch, dtype) for name, conv in tails.items()},
        }

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; padding changes nothing of the cache."""
        B, T = x_BTD.shape[:2]
        lengths_B = jnp.full(B, T) if ctx.lengths_B is None else ctx.lengths_B
        tail = cache["tail"]
        q_BTGN, tail_q = self.query_conv.extend(self.query(x_BTD), tail["query"], lengths_B)
        k_BTGN, tail_k = self.key_conv.extend(self.key(x_BTD), tail["key"], lengths_B)
        v_BTHK, tail_v = self.value_conv.extend(self.value(x_BTD), tail["value"], lengths_B)
        y_BTD, state_BHNK = self._mix(x_BTD, q_BTGN, k_BTGN, v_BTHK, initial_BHNK=cache["state"], real_BT=real(ctx))
        return y_BTD, {"state": state_BHNK, "tail": {"query": tail_q, "key": tail_k, "value": tail_v}}

    def flops_per_token(self, length: int) -> float:
        """Projections, convolution, and the recurrence in its one-token form: reading the state for the correction and
        the output, and writing it."""
        projections = (self.query, self.key, self.value, self.gate, self.beta, self.decay, self.out)
        convolutions = (self.query_conv, self.key_conv, self.value_conv)
        H, N, K = self.state_shape
        return sum(part.flops_per_token() for part in (*projections, *convolutions)) + 6.0 * H * N * K


def _unit(x: jax.Array) -> jax.Array:
    """x of length 1 along its last dimension, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)


def _log_decay(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """log of rates of decay uniform in [0.01, 16)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))
