"""Mamba-2: a selective state space as a mixer, computed by chunks of matrix products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes
from layers.cache import real
from layers.context import Context, CutsLength
from layers.conv import ShortConv, uniform
from layers.gated_norm import GatedRMSNorm
from layers.linear import Linear
from layers.recurrence import flops_per_token, recurrence

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4  # of the initial time steps, log-uniform
DECAY_MAX = 16.0  # initial rates of decay -A are uniform in [1, 16)


class Mamba2(nnx.Module, CutsLength):
    """Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), a head a scalar decay:

        z, x, B, C, dt = u W_in;   x, B, C = silu(conv(x, B, C));   dt = softplus(dt + dt_bias);   A = -exp(A_log)
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T;   y_t = h_t^T C_t + D x_t;   out = W_out norm(y, z)

    u and out: [B, T, D]; x, z, y have H heads of P channels, B and C G heads of N, the state h is [H, N, P]. aux is
    empty. Time steps, decays, states and the norm are in float32. Tokens of different segments share neither state nor
    convolution. W_in is held in five parts and the convolution in three, so that heads can lie on different devices.

    Knobs:
        head_dim P >= 1. heads H >= 1, or None for expand * D / P; expand >= 1, None for 2, is for heads=None alone.
        state N >= 1. groups G: heads that share B and C; a divisor of H; None for 1 (or H with kv_heads).
        kv_heads: None, or the heads to which x and B are projected, and after the convolution repeated to H while C has
        H heads of its own: C, B, x then have the shapes of an attention's queries, keys, values (MambaInLlama, arXiv
        2408.15237; Zebra-Llama, arXiv 2505.17272, with P = N = its head_dim and H P = D).
        conv_width >= 1 tokens. chunk >= 1 tokens a block of the matrix form; it changes the speed alone.
        dt_limits: (low, high) to which time steps are clipped, 0 <= low < high, or None.
        norm: factory of the gated norm, called norm(H P, groups=G, rngs=...).
    Decoding: the cache is the state in float32 and the last conv_width - 1 inputs of the convolution, whatever the
        length of the row.
    Refuses heads that head_dim, groups or kv_heads contradict, and sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expand: int | None = None,
        head_dim: int = 64,
        state: int = 128,
        groups: int | None = None,
        kv_heads: int | None = None,
        conv_width: int = 4,
        chunk: int = 256,
        dt_limits: tuple[float, float] | None = None,
        norm: Callable = GatedRMSNorm,
        rngs: nnx.Rngs,
    ):
        H, G = _heads(dim, heads, expand, head_dim, groups, kv_heads)
        P, N = head_dim, state
        for name, value in (("state", N), ("conv_width", conv_width), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"Mamba2.{name}={value} must be at least 1")
        if dt_limits is not None and not 0 <= dt_limits[0] < dt_limits[1]:
            raise ValueError(f"Mamba2.dt_limits={dt_limits} must be (low, high) with 0 <= low < high, or None")
        self.heads, self.chunk, self.dt_limits = H, chunk, dt_limits
        # Which heads each part of W_in has: (number, name of their axis).
        x_heads, b_heads, c_heads = (H, "heads"), (G, "groups"), (G, "groups")
        if kv_heads is not None:
            x_heads, b_heads, c_heads = (kv_heads, "kv_heads"), (kv_heads, "kv_heads"), (H, "heads")
        self.z = _uniform_linear((dim,), (H, P), ("embed",), ("heads", "head_dim"), rngs)
        self.x = _uniform_linear((dim,), (x_heads[0], P), ("embed",), (x_heads[1], "head_dim"), rngs)
        self.B = _uniform_linear((dim,), (b_heads[0], N), ("embed",), (b_heads[1], "state"), rngs)
        self.C = _uniform_linear((dim,), (c_heads[0], N), ("embed",), (c_heads[1], "state"), rngs)
        self.dt = _uniform_linear((dim,), (H,), ("embed",), ("heads",), rngs)
        self.x_conv = ShortConv((x_heads[0], P), (x_heads[1], "head_dim"), width=conv_width, rngs=rngs)
        self.B_conv = ShortConv((b_heads[0], N), (b_heads[1], "state"), width=conv_width, rngs=rngs)
        self.C_conv = ShortConv((c_heads[0], N), (c_heads[1], "state"), width=conv_width, rngs=rngs)
        self.dt_bias = axes.param(rngs, (H,), ("heads",), dt_bias_init, exact=True)
        self.A_log = axes.param(rngs, (H,), ("heads",), _log_uniform_decay, exact=True)
        self.D = axes.param(rngs, (H,), ("heads",), jax.nn.initializers.ones, exact=True)
        self.norm = norm(H * P, groups=G, rngs=rngs)
        self.out = _uniform_linear((H, P), (dim,), ("heads", "head_dim"), ("embed",), rngs)

    def _mix(self, u_BTD, x_BTHP, b_BTGN, c_BTGN, **carried) -> tuple[jax.Array, jax.Array]:
        """Everything behind the convolution: the output and the state at the end of the row."""
        x_BTHP, b_BTGN, c_BTGN = jax.nn.silu(x_BTHP), jax.nn.silu(b_BTGN), jax.nn.silu(c_BTGN)
        if x_BTHP.shape[2] != self.heads:
            repeats = self.heads // x_BTHP.shape[2]
            x_BTHP, b_BTGN = jnp.repeat(x_BTHP, repeats, 2), jnp.repeat(b_BTGN, repeats, 2)
        x_BTHP = axes.constrain(x_BTHP, "batch", "length", "act_heads", None)
        dt_BTH = jax.nn.softplus(self.dt(u_BTD).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        if self.dt_limits is not None:
            dt_BTH = jnp.clip(dt_BTH, *self.dt_limits)
        x32_BTHP = x_BTHP.astype(jnp.float32)
        y_BTHP, state_BHNP = recurrence(
            c_BTGN,
            b_BTGN,
            (dt_BTH[..., None] * x32_BTHP).astype(u_BTD.dtype),
            log_decay=-jnp.exp(self.A_log[...].astype(jnp.float32)) * dt_BTH,
            chunk=self.chunk,
            **carried,
        )
        y_BTHP = y_BTHP.astype(jnp.float32) + self.D[...].astype(jnp.float32)[:, None] * x32_BTHP
        flat = (*u_BTD.shape[:2], -1)
        y_BTF = self.norm(jnp.reshape(y_BTHP.astype(u_BTD.dtype), flat), jnp.reshape(self.z(u_BTD), flat))
        return self.out(jnp.reshape(y_BTF, x_BTHP.shape)), state_BHNP

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        segments_BT = ctx.segments_BT
        x_BTHP = self.x_conv(self.x(x_BTD), segments_BT)
        b_BTGN, c_BTGN = self.B_conv(self.B(x_BTD), segments_BT), self.C_conv(self.C(x_BTD), segments_BT)
        return self._mix(x_BTD, x_BTHP, b_BTGN, c_BTGN, segments_BT=segments_BT)[0], {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state and the convolution's tails of rows of any length."""
        shape = (batch, self.heads, self.B_conv.channels[1], self.x_conv.channels[1])
        tails = {"x": self.x_conv, "B": self.B_conv, "C": self.C_conv}
        return {
            "state": jnp.zeros(shape, jnp.float32),
            "tail": {name: conv.init_cache(batch, dtype) for name, conv in tails.items()},
        }

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; padding changes nothing of the cache."""
        B, T = x_BTD.shape[:2]
        lengths_B = jnp.full(B, T) if ctx.lengths_B is None else ctx.lengths_B
        tail = cache["tail"]
        x_BTHP, tail_x = self.x_conv.extend(self.x(x_BTD), tail["x"], lengths_B)
        b_BTGN, tail_b = self.B_conv.extend(self.B(x_BTD), tail["B"], lengths_B)
        c_BTGN, tail_c = self.C_conv.extend(self.C(x_BTD), tail["C"], lengths_B)
        y_BTD, state_BHNP = self._mix(x_BTD, x_BTHP, b_BTGN, c_BTGN, initial_BHNK=cache["state"], real_BT=real(ctx))
        return y_BTD, {"state": state_BHNP, "tail": {"x": tail_x, "B": tail_b, "C": tail_c}}

    def flops_per_token(self, length: int) -> float:
        """Projections, convolution and recurrence."""
        projections = sum(part.flops_per_token() for part in (self.z, self.x, self.B, self.C, self.dt, self.out))
        convolutions = sum(conv.flops_per_token() for conv in (self.x_conv, self.B_conv, self.C_conv))
        N, P = self.B_conv.channels[1], self.x_conv.channels[1]
        states = flops_per_token(length, heads=self.heads, state=N, value=P)
        return projections + convolutions + states


def _heads(dim, heads, expand, head_dim, groups, kv_heads) -> tuple[int, int]:
    """(H, G), or a ValueError that names the knob."""
    if head_dim < 1:
        raise ValueError(f"Mamba2.head_dim={head_dim} must be at least 1")
    if heads is not None and expand is not None:
        raise ValueError(f"Mamba2.heads={heads} and expand={expand} say the same thing twice: leave one of them None")
    inner = (2 if expand is None else expand) * dim
    if heads is None and (inner < 1 or inner % head_dim):
        raise ValueError(f"Mamba2.head_dim={head_dim} does not divide expand * D = {inner}: change it, or set heads")
    H = inner // head_dim if heads is None else heads
    if H < 1:
        raise ValueError(f"Mamba2.heads={heads} must be at least 1")
    if kv_heads is not None:
        if kv_heads < 1 or H % kv_heads:
            raise ValueError(f"Mamba2.kv_heads={kv_heads} does not divide the {H} heads: use a divisor, or None")
        if groups not in (None, H):
            raise ValueError(f"Mamba2.groups={groups} contradicts kv_heads={kv_heads}: with kv_heads leave it None")
        return H, H
    G = 1 if groups is None else groups
    if G < 1 or H % G:
        raise ValueError(f"Mamba2.groups={groups} does not divide the {H} heads: use a divisor of them")
    return H, G


def _uniform_linear(inputs, outputs, input_axes, output_axes, rngs) -> Linear:
    """A Linear that starts uniform in +-1 / sqrt(fan in), as the reference implementation leaves it."""
    linear = Linear(inputs, outputs, input_axes, output_axes, rngs=rngs)
    init = uniform(linear.inputs**-0.5)
    linear.kernel = axes.param(rngs, (*inputs, *outputs), (*input_axes, *output_axes), init)
    return linear


def dt_bias_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """softplus^-1 of time steps that are log-uniform in [DT_MIN, DT_MAX), at least DT_FLOOR."""
    log_dt = jax.random.uniform(key, shape, jnp.float32, np.log(DT_MIN), np.log(DT_MAX))
    dt = jnp.maximum(jnp.exp(log_dt), DT_FLOOR)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def _log_uniform_decay(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, DECAY_MAX))
