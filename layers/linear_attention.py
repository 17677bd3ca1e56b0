"""Lightning attention: linear attention with a fixed decay a head and layer, and an output gate (TransNormerLLM)."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes, recurrence
from layers.cache import real
from layers.context import Context, CountsLayers, CutsLength
from layers.linear import Linear
from layers.norm import RMSNorm

SimpleRMSNorm = functools.partial(RMSNorm, gain="none")
FEATURES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "elu": lambda x: 1.0 + jax.nn.elu(x),
    "identity": lambda x: x,
}


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 (i + 1) / H) for heads i of a power of two H; otherwise those of the power of two below, then every other
    one of the power of two above (Press et al. 2021, arXiv 2108.12409). Float64 [H], descending in each part."""
    below = 1 << (heads.bit_length() - 1)

    def powers(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * (np.arange(n) + 1) / n)

    return np.concatenate([powers(below), powers(2 * below)[0::2][: heads - below]])


class LightningAttention(nnx.Module, CutsLength, CountsLayers):
    """The gated linear attention of TransNormerLLM (arXiv 2307.14995, section 3.1), computed by blocks (Lightning
    Attention-2, arXiv 2401.04658):

        q, k = phi(x W_q), phi(x W_k);   v, u = x W_v, x W_u;   q, k = LRPE(q), LRPE(k) if asked
        o_t = sum over s <= t of decay^(t - s) (q_t . k_s) v_s, a head;   y = (norm(o) * u) W_o

    The gate u has no activation, scores are not scaled, and the norm is over all heads together. The decay is
    exp(-slope), fixed. "alibi" (the released code): slope = alibi_slopes(H)_h (1 - l / (L - 1) + 1e-5) for layer l of
    L; "paper_linear" (the paper's text): (8 h / H) (1 - l / L), h and l from 0; "none": no decay. Despite the paper's
    name for it this is not GLA, whose decay depends on the data. This is the release of 2023; of the module of 2024 the
    LayerNorm is a knob (norm), its silu on v and its sigmoid gate through head_dim channels are not here.

    x and y: [B, T, D]. aux is empty. Tokens see only their own segment.

    Knobs:
        heads H >= 1; head_dim K, None for D / H.
        layers L >= 1: the number of layers of the whole network, which scales the slopes; 1 for the same in all.
        decay: "alibi", "paper_linear" or "none". features: phi, "silu", "elu" (1 + elu) or "identity".
        lrpe: factory of LRPE, or None; the released models have it in layer 0 alone (Stack.prefix).
        gate: whether there is u. norm: factory of the norm over H K channels. chunk >= 1 tokens a block: speed alone.
    Decoding: the cache is the state, float32 [H, K, K], [H, 2K, K] with LRPE, whatever the length.
    Refuses heads that do not divide the width, layers above 1 where the network does not say which layer it is, and
        fewer than its Stack has: the last ones would not decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        layers: int = 1,
        decay: Literal["alibi", "paper_linear", "none"] = "alibi",
        features: Literal["silu", "elu", "identity"] = "silu",
        lrpe: Callable | None = None,
        gate: bool = True,
        norm: Callable = SimpleRMSNorm,
        chunk: int = recurrence.CHUNK,
        rngs: nnx.Rngs,
    ):
        for name, value in (("heads", heads), ("layers", layers), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"LightningAttention.{name}={value} must be at least 1")
        if head_dim is None and dim % heads:
            raise ValueError(
                f"LightningAttention.heads={heads} does not divide the width {dim}: change it, or set head_dim"
            )
        if decay not in ("alibi", "paper_linear", "none"):
            raise ValueError(f"LightningAttention.decay={decay!r} must be 'alibi', 'paper_linear' or 'none'")
        if features not in FEATURES:
            raise ValueError(f"LightningAttention.features={features!r} must be one of {', '.join(FEATURES)}")
        H, K = heads, dim // heads if head_dim is None else head_dim
        self.heads, self.head_dim, self.layers, self.chunk = H, K, layers, chunk
        self.decay, self.features = decay, features
        project = functools.partial(Linear, (dim,), (H, K), ("embed",), ("heads", "head_dim"), rngs=rngs)
        self.query, self.key, self.value = project(), project(), project()
        self.gate = project() if gate else None
        self.lrpe = None if lrpe is None else _lrpe(lrpe, H, K, rngs)
        self.norm = norm(H * K, rngs=rngs)
        self.out = Linear((H, K), (dim,), ("heads", "head_dim"), ("embed",), rngs=rngs)

    @property
    def state_dim(self) -> int:
        """Width N of queries and keys as the state sees them."""
        return self.head_dim if self.lrpe is None else 2 * self.head_dim

    def check_layers(self, count: int) -> None:
        """Raises ValueError where the network has more layers than the slopes are scaled for."""
        if 1 < self.layers < count and self.decay != "none":
            raise ValueError(
                f"LightningAttention.layers={self.layers} is less than the {count} layers of its Stack (prefix, depth "
                f"and suffix), the last of which would not decay: set it to {count}, or to 1 for the same decay in all"
            )

    def log_decay(self, layer: jax.Array | None) -> jax.Array | None:
        """Float32 [H] of this layer, or None without decay."""
        if self.decay == "none":
            return None
        if self.layers > 1 and layer is None:
            raise ValueError(f"LightningAttention.layers={self.layers} needs the index of the layer: use a Stack, or 1")
        layer = jnp.zeros((), jnp.float32) if layer is None else jnp.asarray(layer, jnp.float32)
        if self.decay == "alibi":
            slopes_H = alibi_slopes(self.heads)
            scale = 1.0 if self.layers == 1 else 1.0 - layer / (self.layers - 1) + 1e-5
        else:
            slopes_H = 8.0 * np.arange(self.heads) / self.heads
            scale = 1.0 if self.layers == 1 else 1.0 - layer / self.layers
        return -jnp.asarray(slopes_H, jnp.float32) * jnp.maximum(scale, 0.0)

    def _mix(self, x_BTD, ctx: Context, **carried) -> tuple[jax.Array, jax.Array]:
        phi = FEATURES[self.features]
        q_BTHN, k_BTHN, v_BTHK = phi(self.query(x_BTD)), phi(self.key(x_BTD)), self.value(x_BTD)
        if self.lrpe is not None:
            q_BTHN, k_BTHN = self.lrpe(q_BTHN, ctx.positions_BT), self.lrpe(k_BTHN, ctx.positions_BT)
        q_BTHN, k_BTHN, v_BTHK = (
            axes.constrain(z, "batch", "length", "act_heads", None) for z in (q_BTHN, k_BTHN, v_BTHK)
        )
        o_BTHK, state_BHNK = recurrence.recurrence(
            q_BTHN, k_BTHN, v_BTHK, log_decay=self.log_decay(ctx.layer), chunk=self.chunk, **carried
        )
        o_BTHK = jnp.reshape(self.norm(jnp.reshape(o_BTHK, (*o_BTHK.shape[:2], -1))), o_BTHK.shape)
        return self.out(o_BTHK if self.gate is None else o_BTHK * self.gate(x_BTD)), state_BHNK

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self._mix(x_BTD, ctx, segments_BT=ctx.segments_BT)[0], {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state of rows of any length."""
        return {"state": jnp.zeros((batch, self.heads, self.state_dim, self.head_dim), jnp.float32)}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; padding leaves the state alone."""
        y_BTD, state_BHNK = self._mix(x_BTD, ctx, initial_BHNK=cache["state"], real_BT=real(ctx))
        return y_BTD, {"state": state_BHNK}

    def flops_per_token(self, length: int) -> float:
        """Projections and the recurrence."""
        parts = [self.query, self.key, self.value, self.out] + ([] if self.gate is None else [self.gate])
        mixing = recurrence.flops_per_token(length, heads=self.heads, state=self.state_dim, value=self.head_dim)
        return math.fsum(part.flops_per_token() for part in parts) + mixing


def _lrpe(lrpe: Callable, heads: int, head_dim: int, rngs: nnx.Rngs) -> Any:
    try:
        return lrpe(heads, head_dim, rngs=rngs)
    except TypeError as error:
        raise ValueError(
            f"LightningAttention.lrpe makes no embedding of {heads} heads of {head_dim} "
            f"({str(error).splitlines()[0]}): use LRPE or None; RoPE is for softmax attention and Retention"
        ) from error
