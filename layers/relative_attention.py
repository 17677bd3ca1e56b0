"""The attentions of T5: a row on itself with a bias by distance, and a row on the output of an encoder."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes, kernels, taps
from layers.cache import real, write
from layers.context import Context, ReadsPrefix, ReadsSource
from layers.linear import Linear


class RelativeBias(nnx.Module):
    """bias[h, i, j] = table[bucket(j - i), h], added to attention scores (T5, arXiv 1910.10683, section 2.1).

    The first half of the buckets of a direction are single distances, the others grow with their logarithm up to
    `max_distance`; all distances from there on share the last one.

    Called with query positions [B or 1, T] and key positions [B or 1, S], returns [B or 1, H, T, S].

    Knobs: heads H >= 1; buckets, even, at least 4; max_distance, in tokens, above the number of single distances;
    bidirectional: half of the buckets for keys behind the query, half for keys ahead; otherwise keys ahead share the
    bucket of distance 0 (they are masked); std > 0 of the initial table.
    """

    def __init__(
        self,
        *,
        heads: int,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        if heads < 1:
            raise ValueError(f"RelativeBias.heads={heads} must be at least 1")
        if buckets < 4 or buckets % 2:
            raise ValueError(f"RelativeBias.buckets={buckets} must be even and at least 4")
        single = buckets // (4 if bidirectional else 2)
        if max_distance <= single:
            raise ValueError(f"RelativeBias.max_distance={max_distance} must exceed the {single} single distances")
        if std <= 0:
            raise ValueError(f"RelativeBias.std={std} must be positive")
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.table = axes.param(rngs, (buckets, heads), ("positions", "heads"), axes.normal(std))

    def bucket(self, distance: np.ndarray) -> np.ndarray:
        """Bucket of each distance key - query."""
        ahead = (distance > 0) * (self.buckets // 2 if self.bidirectional else 0)
        buckets = self.buckets // 2 if self.bidirectional else self.buckets
        size = np.abs(distance) if self.bidirectional else np.maximum(-distance, 0)
        single = buckets // 2
        # In float32, as the checkpoints were trained: at a border of two buckets the last bit decides.
        turns = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(single))
        turns = turns / np.float32(math.log(self.max_distance / single)) * np.float32(buckets - single)
        wide = np.minimum(single + np.maximum(turns, 0).astype(np.int32), buckets - 1)
        return ahead + np.where(size < single, size, wide)

    def __call__(self, q_positions_BT: jax.Array, k_positions_BS: jax.Array) -> jax.Array:
        m = self.max_distance  # beyond it nothing changes, so a short list of distances has every bias there is
        by_distance_NH = self.table[...][self.bucket(np.arange(-m, m + 1))]
        distance_BTS = jnp.clip(k_positions_BS[:, None, :] - q_positions_BT[:, :, None], -m, m)
        return jnp.moveaxis(jnp.take(by_distance_NH, distance_BTS + m, axis=0), -1, 1)


class RelativeAttention(nnx.Module, ReadsPrefix):
    """Attention of a row on itself whose scores get a bias by distance, unscaled (T5).

    x and y: [B, T, D]. aux is empty. Tokens see only their own segment. All T x S scores of a head are held at once.

    Knobs: heads H; head_dim K, None for D / H; bias: factory of a bias such as RelativeBias (with `heads`, and
    `bidirectional` unless causal), or None to take the one that all layers share, Context.bias_BHTS; causal; scale > 0
    of the scores.
    Decoding: keys and values of every token, as in Attention; the shared bias is then [B, H, T, S] for S slots.
    Refuses a width that heads does not divide without head_dim, a bias of another shape, none at all, and a cache
    without causality.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        bias: Callable | None = None,
        causal: bool = True,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        K = _head_dim("RelativeAttention", dim, heads, head_dim, scale)
        self.heads, self.head_dim, self.causal, self.scale = heads, K, causal, scale
        self.query, self.key, self.value, self.out = _projections(dim, heads, K, self.scale, rngs)
        self.bias = None if bias is None else bias(rngs=rngs)

    def _project(self, x_BTD) -> tuple[jax.Array, ...]:
        """Queries, keys and values."""
        parts = {"queries": self.query, "keys": self.key, "values": self.value}
        return tuple(taps.tap(name, linear(x_BTD), self) for name, linear in parts.items())

    def _bias(self, ctx: Context, q_positions_BT, k_positions_BS) -> jax.Array:
        bias_BHTS = ctx.bias_BHTS if self.bias is None else self.bias(q_positions_BT, k_positions_BS)
        if bias_BHTS is None:
            raise ValueError(
                "RelativeAttention.bias is None and the network shares none: give the layer a RelativeBias, "
                "or bind EncoderDecoder.bias"
            )
        if bias_BHTS.shape[1] != self.heads:
            raise ValueError(f"RelativeBias.heads={bias_BHTS.shape[1]} must be RelativeAttention.heads={self.heads}")
        return bias_BHTS

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        positions_1T = jnp.arange(x_BTD.shape[1])[None]
        visible_BTS = kernels.visibility(
            positions_1T, positions_1T, causal=self.causal, window=None, prefix_BS=ctx.prefix_BT
        )
        if ctx.segments_BT is not None:
            visible_BTS = visible_BTS & (ctx.segments_BT[:, :, None] == ctx.segments_BT[:, None, :])
        kernels.take("biased_attention", "xla", "scores with a bias are held whole")
        q_BTHK, k_BTHK, v_BTHK = self._project(x_BTD)
        y_BTHK = kernels.masked_attention(
            q_BTHK,
            jnp.swapaxes(k_BTHK, 1, 2),
            jnp.swapaxes(v_BTHK, 1, 2),
            visible_BTS,
            scale=self.scale,
            bias_BHTS=self._bias(ctx, positions_1T, positions_1T),
        )
        return _project_out(self, y_BTHK), {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """An empty cache for rows of at most `length` tokens."""
        if not self.causal:
            raise ValueError("RelativeAttention.causal=False has no cache: only causal attention decodes by token")
        shape = (batch, self.heads, length, self.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real, at ctx.positions_BT."""
        slots = cache["k"].shape[2]
        slot_BT = jnp.where(real(ctx), ctx.cache_slots_BT, slots)
        q_BTHK, k_BTHK, v_BTHK = self._project(x_BTD)
        cache = write(cache, {"k": k_BTHK, "v": v_BTHK}, slot_BT)
        prefix_BS, k_positions_1S = None, jnp.arange(slots)[None]
        if ctx.prefix_BT is not None:
            none = {"prefix": jnp.zeros((x_BTD.shape[0], slots), bool)}
            prefix_BS = write(none, {"prefix": ctx.prefix_BT}, slot_BT)["prefix"]
        visible_BTS = kernels.visibility(
            ctx.cache_slots_BT, k_positions_1S, causal=True, window=None, prefix_BS=prefix_BS
        )
        y_BTHK = kernels.masked_attention(
            q_BTHK,
            cache["k"].astype(x_BTD.dtype),
            cache["v"].astype(x_BTD.dtype),
            visible_BTS,
            scale=self.scale,
            bias_BHTS=self._bias(ctx, ctx.cache_slots_BT, k_positions_1S),
        )
        return _project_out(self, y_BTHK), cache

    def flops_per_token(self, length: int) -> float:
        """Projections, scores and mixing; half the row if causal. The lookup of the bias counts nothing."""
        keys = length / 2 if self.causal else length
        projections = sum(part.flops_per_token() for part in (self.query, self.key, self.value, self.out))
        return projections + 2 * 2.0 * self.heads * self.head_dim * keys


class CrossAttention(nnx.Module, ReadsPrefix, ReadsSource):
    """Attention of a decoder's row on the output of an encoder, Context.memory_BSD (Vaswani et al. 2017).

    x and y: [B, T, D]. aux is empty. A token sees the source tokens of its own segment, or where the decoder's rows are
    unpacked all but padding; one that sees none gets zero from the softmax.

    Knobs: heads H; head_dim K, None for D / H; scale > 0 of the scores, None for 1 / sqrt(K) (T5: 1.0).
    Decoding: `remember` makes the cache, keys and values of the source, once for a row; `extend` only reads it.
    Refuses a width that heads does not divide without head_dim, a call without memory, and a cache never filled.
    """

    def __init__(
        self, dim: int, *, heads: int, head_dim: int | None = None, scale: float | None = None, rngs: nnx.Rngs
    ):
        K = _head_dim("CrossAttention", dim, heads, head_dim, 1.0 if scale is None else scale)
        self.heads, self.head_dim, self.scale = heads, K, K**-0.5 if scale is None else scale
        self.query, self.key, self.value, self.out = _projections(dim, heads, K, self.scale, rngs)

    def _by_head(self, memory_BSD):
        """Keys and values of the source, a matrix a head."""
        parts = {"keys": self.key, "values": self.value}
        return tuple(jnp.swapaxes(taps.tap(name, linear(memory_BSD), self), 1, 2) for name, linear in parts.items())

    def _attend(self, x_BTD, k_BHSK, v_BHSK, visible_BTS):
        q_BTHK = taps.tap("queries", self.query(x_BTD), self)
        y_BTHK = kernels.masked_attention(q_BTHK, k_BHSK, v_BHSK, visible_BTS, scale=self.scale)
        y_BTHK = jnp.where(jnp.any(visible_BTS, -1)[:, :, None, None], y_BTHK, jnp.zeros((), y_BTHK.dtype))
        return _project_out(self, y_BTHK)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        if ctx.memory_BSD is None:
            raise ValueError("CrossAttention needs the output of an encoder: use it in the decoder of EncoderDecoder")
        visible_BTS = jnp.ones((*x_BTD.shape[:2], ctx.memory_BSD.shape[1]), bool)
        source_BS = None if ctx.source is None else ctx.source.segments_BS
        if source_BS is not None and ctx.segments_BT is not None:
            visible_BTS = ctx.segments_BT[:, :, None] == source_BS[:, None, :]
        elif source_BS is not None:
            visible_BTS = visible_BTS & (source_BS > 0)[:, None, :]
        kernels.take("cross_attention", "xla", "scores are held whole")
        return self._attend(x_BTD, *self._by_head(ctx.memory_BSD), visible_BTS), {}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """Nothing yet: the cache comes from `remember`, when there is a source."""
        return {}

    def remember(self, memory_BSD: jax.Array, real_BS: jax.Array, dtype: jnp.dtype) -> dict[str, Any]:
        """The cache of an encoded source; real_BS, bool: which of its tokens are no padding."""
        k_BHSK, v_BHSK = self._by_head(memory_BSD)
        return {"k": k_BHSK.astype(dtype), "v": v_BHSK.astype(dtype), "real": real_BS}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """The same for T new tokens of a row; the cache does not change."""
        if not cache:
            raise ValueError("CrossAttention has no source in its cache: decode with EncoderDecoder.given(source)")
        visible_BTS = jnp.broadcast_to(cache["real"][:, None, :], (*x_BTD.shape[:2], cache["real"].shape[1]))
        k_BHSK, v_BHSK = cache["k"].astype(x_BTD.dtype), cache["v"].astype(x_BTD.dtype)
        return self._attend(x_BTD, k_BHSK, v_BHSK, visible_BTS), cache

    def flops_per_token(self, length: int) -> float:
        """For as many source tokens as target tokens, `length`: projections on both sides, scores and mixing."""
        projections = sum(part.flops_per_token() for part in (self.query, self.key, self.value, self.out))
        return projections + 2 * 2.0 * self.heads * self.head_dim * length


def _head_dim(owner: str, dim: int, heads: int, head_dim: int | None, scale: float) -> int:
    if heads < 1 or (head_dim is None and dim % heads):
        raise ValueError(f"{owner}.heads={heads} does not divide the width {dim}: change it, or set head_dim")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"{owner}.head_dim={head_dim} must be at least 1, or None for the width / heads")
    if scale <= 0:
        raise ValueError(f"{owner}.scale={scale} must be positive")
    return dim // heads if head_dim is None else head_dim


def _project_out(attention: RelativeAttention | CrossAttention, y_BTHK) -> jax.Array:
    return attention.out(taps.tap("gated_output", taps.tap("attention_output", y_BTHK, attention), attention))


def _projections(dim: int, H: int, K: int, scale: float, rngs: nnx.Rngs) -> tuple[Linear, Linear, Linear, Linear]:
    """Query, key, value and out without offsets. Where scores are not divided by sqrt(K), the initial queries are."""

    def into_heads(std: float) -> Linear:
        return Linear((dim,), (H, K), ("embed",), ("heads", "head_dim"), std=std, rngs=rngs)

    out = Linear((H, K), (dim,), ("heads", "head_dim"), ("embed",), rngs=rngs)
    return into_heads((dim * K) ** -0.5 / scale), into_heads(dim**-0.5), into_heads(dim**-0.5), out
