"""Softmax attention: multi-head, multi-query and grouped-query, over the whole row or a sliding window."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, kernels, taps
from layers.attention_gate import gated
from layers.cache import append, real, write
from layers.context import AnyOrder, Context, ReadsPrefix
from layers.linear import Linear
from layers.rope import rotary
from layers.rope2d import RoPE2D


class Attention(nnx.Module, ReadsPrefix, AnyOrder):
    """Dot-product attention of a row on itself (Vaswani et al. 2017; grouped-query: Ainslie et al. 2023, arXiv
    2305.13245).

    x and y: [B, T, D]. aux: the gate's metrics, if any. Tokens see only their own segment.

    Knobs:
        heads H >= 1; kv_heads G, a divisor of H: None for H (multi-head), 1 for multi-query; head_dim K, None for D /
        H.
        rope: factory of a rotary embedding such as RoPE, or None. qk_norm: factory of a norm over head_dim of queries
        and keys before rotation, such as RMSNorm (arXiv 2302.05442), or None.
        qkv_bias, out_bias: learned offsets on the projections.
        causal: whether a token sees only itself, the past and the prefix (Context.prefix_BT). window >= 1: it sees only
        keys fewer than `window` positions away (itself included), None for all.
        scale > 0 of the scores, None for 1 / sqrt(K). soft_cap > 0: scores become soft_cap * tanh(score / soft_cap)
        (arXiv 2408.00118). sinks: a learned logit a head joins the softmax with no value (arXiv 2508.10925).
        gate: factory of a gate such as AttentionGate (arXiv 2505.06708), or None.
        branch_gain > 0: factor on the initial weights of value and output (DeepNorm's beta, arXiv 2203.00555).
    Decoding: keys are cached after qk_norm and rotation. A full cache holds [B, G, S, K]; with a window it is a ring of
        `window` slots with the position that each one holds, -1 where empty. Padding is never written.
    Refuses heads that kv_heads does not divide, a head_dim that does not follow from D, and a cache without causality.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: Callable | None = None,
        qk_norm: Callable | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        gate: Callable | None = None,
        branch_gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        H, G = heads, heads if kv_heads is None else kv_heads
        if H < 1 or G < 1 or H % G:
            raise ValueError(
                f"Attention.kv_heads={kv_heads} does not divide heads={heads}: use a divisor, or None for heads"
            )
        if head_dim is None and dim % H:
            raise ValueError(f"Attention.heads={heads} does not divide the width {dim}: change it, or set head_dim")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"Attention.head_dim={head_dim} must be at least 1, or None for the width / heads")
        if window is not None and window < 1:
            raise ValueError(f"Attention.window={window} must be at least 1 token, or None for the whole row")
        for name, value in (("scale", scale), ("soft_cap", soft_cap), ("branch_gain", branch_gain)):
            if value is not None and value <= 0:
                raise ValueError(f"Attention.{name}={value} must be positive, or None")
        K = dim // H if head_dim is None else head_dim
        self.causal, self.window, self.soft_cap = causal, window, soft_cap
        self.scale = K**-0.5 if scale is None else scale
        self.kv_heads, self.head_dim = G, K
        kv = {"bias": qkv_bias, "rngs": rngs}
        std, out_std = branch_gain * dim**-0.5, branch_gain * (H * K) ** -0.5
        self.query = Linear((dim,), (H, K), ("embed",), ("heads", "head_dim"), bias=qkv_bias, rngs=rngs)
        self.key = Linear((dim,), (G, K), ("embed",), ("kv_heads", "head_dim"), **kv)
        self.value = Linear((dim,), (G, K), ("embed",), ("kv_heads", "head_dim"), std=std, **kv)
        self.out = Linear((H, K), (dim,), ("heads", "head_dim"), ("embed",), bias=out_bias, std=out_std, rngs=rngs)
        self.rope = rotary("Attention", rope, K)
        self.query_norm = None if qk_norm is None else qk_norm(K, rngs=rngs)
        self.key_norm = None if qk_norm is None else qk_norm(K, rngs=rngs)
        self.sinks = axes.param(rngs, (H,), ("heads",), axes.normal(0.02)) if sinks else None
        self.gate = None if gate is None else gate(dim, H, G, K, rngs=rngs)

    def _project(self, x_BTD):
        """Queries, keys and values, normed and gated but not rotated, and the gate's score."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        score = None if self.gate is None else self.gate.score(x_BTD)
        q_BTHK = gated(self.gate, "g4", q_BTHK, score)
        k_BTGK = gated(self.gate, "g3", k_BTGK, score)
        return q_BTHK, k_BTGK, gated(self.gate, "g2", v_BTGK, score), score

    def _rotate(self, q_BTHK, k_BTGK, v_BTGK, ctx: Context):
        """Queries and keys rotated; values as they are."""
        positions = (ctx.positions_BT,)
        if isinstance(self.rope, RoPE2D):
            positions = (ctx.positions_BT if ctx.anchors_BT is None else ctx.anchors_BT, ctx.blocks_BT)
        if self.rope is not None:
            q_BTHK, k_BTGK = self.rope(q_BTHK, *positions), self.rope(k_BTGK, *positions)
        tapped = {"queries": q_BTHK, "keys": k_BTGK, "values": v_BTGK}
        return tuple(
            taps.tap(name, axes.constrain(z, "batch", "length", "act_heads", None), self) for name, z in tapped.items()
        )

    def _finish(self, y_BTHK, score):
        """The output projection, with the gates around it."""
        y_BTHK = gated(self.gate, "g1", taps.tap("attention_output", y_BTHK, self), score)
        return gated(self.gate, "g5", self.out(taps.tap("gated_output", y_BTHK, self)), score)

    def _aux(self, score, ctx: Context) -> dict[str, jax.Array]:
        return {} if self.gate is None else self.gate.metrics(score, ctx)

    def _sinks(self):
        return None if self.sinks is None else self.sinks[...]

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        q_BTHK, k_BTGK, v_BTGK, score = self._project(x_BTD)
        q_BTHK, k_BTGK, v_BTGK = self._rotate(q_BTHK, k_BTGK, v_BTGK, ctx)
        y_BTHK = kernels.attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            scale=self.scale,
            causal=self.causal,
            window=self.window,
            soft_cap=self.soft_cap,
            segments_BT=ctx.segments_BT,
            sinks_H=self._sinks(),
            prefix_BT=ctx.prefix_BT,
            order_BT=ctx.order_BT,
        )
        return self._finish(y_BTHK, score), self._aux(score, ctx)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """An empty cache for rows of at most `length` tokens."""
        if not self.causal:
            raise ValueError("Attention.causal=False has no cache: only causal attention decodes token by token")
        slots = length if self.window is None else min(self.window, length)
        shape = (batch, self.kv_heads, slots, self.head_dim)
        cache = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
        return cache if self.window is None else cache | {"position": jnp.full((batch, slots), -1, jnp.int32)}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real, at ctx.positions_BT."""
        q_BTHK, k_BTGK, v_BTGK, score = self._project(x_BTD)
        q_BTHK, k_BTGK, v_BTGK = self._rotate(q_BTHK, k_BTGK, v_BTGK, ctx)
        new, real_BT, slots = {"k": k_BTGK, "v": v_BTGK}, real(ctx), cache["k"].shape[2]
        if self.window is None:
            cache = write(cache, new, jnp.where(real_BT, ctx.cache_slots_BT, slots))
            seen, k_positions_BS = cache, jnp.arange(slots)[None]
        else:
            # Attend before writing: a chunk longer than the ring would overwrite keys that its first tokens still see.
            new["position"] = jnp.where(real_BT, ctx.positions_BT, -1)
            seen = append(cache, new)
            last_BT = real_BT & (jnp.arange(real_BT.shape[1]) >= jnp.sum(real_BT, 1, keepdims=True) - slots)
            cache = write(cache, new, jnp.where(last_BT, ctx.positions_BT % slots, slots))
            k_positions_BS = seen["position"]
        prefix_BS = None if ctx.prefix_BT is None else _prefix(ctx, real_BT, slots, ring=self.window is not None)
        visible_BTS = kernels.visibility(
            ctx.cache_slots_BT, k_positions_BS, causal=True, window=self.window, prefix_BS=prefix_BS
        )
        visible_BTS = visible_BTS & (k_positions_BS >= 0)[:, None, :]
        y_BTHK = kernels.masked_attention(
            q_BTHK,
            seen["k"].astype(q_BTHK.dtype),
            seen["v"].astype(q_BTHK.dtype),
            visible_BTS,
            scale=self.scale,
            soft_cap=self.soft_cap,
            sinks_H=self._sinks(),
        )
        return self._finish(y_BTHK, score), cache

    def flops_per_token(self, length: int) -> float:
        """Projections, and scores and mixing over the mean number of visible keys: half the row if causal."""
        window = length if self.window is None else min(self.window, length)
        keys = window - window**2 / (2 * length) if self.causal else min(length, 2 * window - 1)
        projections = sum(part.flops_per_token() for part in (self.query, self.key, self.value, self.out))
        gate = 0.0 if self.gate is None else self.gate.flops_per_token()
        return projections + gate + 2 * 2.0 * self.query.outputs * keys


def _prefix(ctx: Context, real_BT: jax.Array, slots: int, *, ring: bool) -> jax.Array:
    """Which of the keys that `extend` attends to are prefix tokens of this call: [B, S]; behind a ring [B, S + T]."""
    prefix_BT = ctx.prefix_BT & real_BT
    none_BS = jnp.zeros((prefix_BT.shape[0], slots), bool)
    if ring:
        return jnp.concatenate([none_BS, prefix_BT], 1)
    return none_BS.at[jnp.arange(len(none_BS))[:, None], jnp.where(real_BT, ctx.cache_slots_BT, slots)].set(
        prefix_BT, mode="drop"
    )
