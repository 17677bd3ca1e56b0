"""Dual chunk attention: rows longer than those in training, without one distance that training has not seen."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, kernels, taps
from layers.attention import Attention
from layers.cache import real, write
from layers.context import Context
from layers.masked_attention import MASKED, chunks, visibility
from layers.ring_attention import over_all_keys
from layers.rope2d import RoPE2D

WHOLE = 1024  # longest row whose T x T scores are held at once
QUERIES = 256  # queries at a time in longer rows


class DualChunk(Attention):
    """Causal attention with rotary distances folded back into the trained range (Dual Chunk Attention, arXiv
    2402.17463), in one softmax. Trains nothing: it has the parameters of Attention and reads its checkpoints.

    Keys rotate at position j mod c. A query at i meets the keys of chunk floor(j / c), D = floor(i/c) - floor(j/c), at

        D = 0   i mod c                             exact distance
        D = 1   min(i mod c + c, c + w - 1)         exact for the w nearest tokens across the border
        D > 1   c + w - 1

    so no distance exceeds c + w - 1, and a row of up to c + w tokens is ordinary attention.

    x and y: [B, T, D]. aux: the gate's metrics, if any. Tokens see only their own segment, whose chunks count from its
    first token.

    Knobs:
        heads, kv_heads, head_dim, qk_norm, qkv_bias, out_bias, scale, gate: as in Attention. rope: factory of a rotary
        embedding that keeps the trained frequencies: interpolating them as well is worse than either alone.
        chunk c >= 1 and local w, 1 <= w <= c, in tokens. trained_length L0 in tokens, c + w <= L0.
        logit_scale: what multiplies scores of a query with n = i + 1 > L0 tokens so far: "none" 1; "once" 0.1 ln(n /
        L0) + 1; "yarn_sq" its square, the temperature of YaRN. Counting the tokens so far instead of the final length,
        which a decoder does not know, makes decoding equal the whole row.
    Decoding: keys are cached rotated at j mod c and never rotated again, with the position of each.
    Refuses chunks and local windows outside their ranges, a prefix that earlier tokens see, two-dimensional rotary
        positions, and what Attention refuses.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        chunk: int,
        local: int,
        trained_length: int,
        rope: Callable,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: Callable | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        logit_scale: Literal["none", "once", "yarn_sq"] = "none",
        gate: Callable | None = None,
        rngs: nnx.Rngs,
    ):
        if chunk < 1:
            raise ValueError(f"DualChunk.chunk={chunk} must be at least 1 token")
        if not 1 <= local <= chunk:
            raise ValueError(f"DualChunk.local={local} must lie between 1 and chunk={chunk}")
        if chunk + local > trained_length:
            raise ValueError(
                f"DualChunk.chunk={chunk} + local={local} exceeds trained_length={trained_length}: distances up to "
                "chunk + local - 1 would be new to the model, so lower either"
            )
        if logit_scale not in ("none", "once", "yarn_sq"):
            raise ValueError(f"DualChunk.logit_scale={logit_scale!r} must be 'none', 'once' or 'yarn_sq'")
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            scale=scale,
            gate=gate,
            rngs=rngs,
        )
        if isinstance(self.rope, RoPE2D):
            raise ValueError("DualChunk.rope=RoPE2D has a second position that no chunk folds back: use RoPE")
        self.chunk, self.local, self.trained_length = chunk, local, trained_length
        self.temperature_power = {"none": 0, "once": 1, "yarn_sq": 2}[logit_scale]

    def query_positions(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where queries rotate for keys of their own chunk, the one before, and all earlier ones."""
        inside_BT = positions_BT % self.chunk
        last = self.chunk + self.local - 1
        return inside_BT, jnp.minimum(inside_BT + self.chunk, last), jnp.full_like(inside_BT, last)

    def _rotate_chunks(self, q_BTHK, k_BTGK, v_BTGK, ctx: Context):
        """Queries for keys of their own chunk, the one before and all earlier ones, times scale; keys; values."""
        if ctx.prefix_BT is not None:
            raise ValueError(
                "DualChunk has no distance for a prefix that earlier tokens see (Context.prefix_BT): drop the batch's "
                "`prefix` field, or use Attention"
            )
        positions_BT = ctx.positions_BT
        q_BTHK = q_BTHK * self.scale
        if self.temperature_power:
            excess_BT = (positions_BT.astype(jnp.float32) + 1) / self.trained_length
            temperature_BT = (0.1 * jnp.log(jnp.maximum(excess_BT, 1.0)) + 1) ** self.temperature_power
            q_BTHK = q_BTHK * temperature_BT[:, :, None, None].astype(q_BTHK.dtype)
        queries = tuple(self.rope(q_BTHK, place_BT) for place_BT in self.query_positions(positions_BT))
        keys = self.rope(k_BTGK, positions_BT % self.chunk)
        queries, keys, values = jax.tree.map(
            lambda z: axes.constrain(z, "batch", "length", "act_heads", None), (queries, keys, v_BTGK)
        )
        queries = tuple(taps.tap("queries", q_BTHK, self) for q_BTHK in queries)
        return queries, taps.tap("keys", keys, self), taps.tap("values", values, self)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        q_BTHK, k_BTGK, v_BTGK, score = self._project(x_BTD)
        queries, k_BTGK, v_BTGK = self._rotate_chunks(q_BTHK, k_BTGK, v_BTGK, ctx)
        places = {"index": ctx.order_BT, "chunk": ctx.positions_BT // self.chunk, "segment": ctx.segments_BT}
        if ctx.order_BT is None:
            places["index"] = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), ctx.positions_BT.shape)
        places = {name: x_BT for name, x_BT in places.items() if x_BT is not None}
        y_BTHK = over_all_keys(_attend_row, (queries, places), (k_BTGK, v_BTGK, places))
        return self._finish(y_BTHK, score), self._aux(score, ctx)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """An empty cache for rows of at most `length` tokens."""
        return super().init_cache(batch, length, dtype) | {"position": jnp.zeros((batch, length), jnp.int32)}

    def extend(
        self, x_BTD: jax.Array, cache: dict[str, jax.Array], ctx: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real, at ctx.positions_BT."""
        q_BTHK, k_BTGK, v_BTGK, score = self._project(x_BTD)
        queries, k_BTGK, v_BTGK = self._rotate_chunks(q_BTHK, k_BTGK, v_BTGK, ctx)
        new, slots = {"k": k_BTGK, "v": v_BTGK, "position": ctx.positions_BT}, cache["k"].shape[2]
        cache = write(cache, new, jnp.where(real(ctx), ctx.cache_slots_BT, slots))
        visible_BTS = visibility(ctx.cache_slots_BT, jnp.arange(slots)[None], causal=True, window=None)
        apart_BTS = (ctx.positions_BT // self.chunk)[:, :, None] - (cache["position"] // self.chunk)[:, None, :]
        k_BGSK, v_BGSK = cache["k"].astype(x_BTD.dtype), cache["v"].astype(x_BTD.dtype)
        y_BTHK = _attend(queries, k_BGSK, v_BGSK, apart_BTS, visible_BTS)
        return self._finish(y_BTHK, score), cache


def _attend_row(queries, keys) -> jax.Array:
    """`_attend` for queries with their places (index in the row, chunk, segment) and keys, values and theirs."""
    k_BSGK, v_BSGK, k_places = keys
    k_BGSK, v_BGSK = jnp.swapaxes(k_BSGK, 1, 2), jnp.swapaxes(v_BSGK, 1, 2)

    def attend(xs):
        queries, places = xs
        visible_BCS = visibility(places["index"], k_places["index"], causal=True, window=None)
        if "segment" in places:
            visible_BCS = visible_BCS & (places["segment"][:, :, None] == k_places["segment"][:, None, :])
        apart_BCS = places["chunk"][:, :, None] - k_places["chunk"][:, None, :]
        return _attend(queries, k_BGSK, v_BGSK, apart_BCS, visible_BCS)

    (B, T), reason = queries[1]["index"].shape, "no flash kernel chooses among three rotations of a query"
    if kernels.take("dual_chunk", "whole" if k_BSGK.shape[1] <= WHOLE else "chunked", reason) == "whole":
        return attend(queries)
    y_NBCHK = jax.lax.map(jax.checkpoint(attend), jax.tree.map(lambda x: chunks(x, QUERIES), queries))
    return jnp.reshape(jnp.swapaxes(y_NBCHK, 0, 1), (B, -1, *y_NBCHK.shape[3:]))[:, :T]


def _attend(queries, k_BGSK, v_BGSK, apart_BTS, visible_BTS) -> jax.Array:
    """softmax over visible keys of q . k, with the first, second or third query for keys of the same chunk, the one
    before or an earlier one; [B, T, H, K]. Queries carry their scale; keys and values lie head by head."""
    B, T, H, K = queries[0].shape
    G, S = k_BGSK.shape[1:3]
    R = H // G
    q_BG3RTK = jnp.transpose(jnp.reshape(jnp.stack(queries, 1), (B, 3, T, G, R, K)), (0, 3, 1, 4, 2, 5))
    # One product, so that a decoding step reads the keys once.
    q_BGMK = jnp.reshape(q_BG3RTK, (B, G, 3 * R * T, K))
    s_BGMS = jnp.einsum("bgmk,bgsk->bgms", q_BGMK, k_BGSK, preferred_element_type=jnp.float32)
    s_BG3RTS = jnp.reshape(s_BGMS, (B, G, 3, R, T, S))
    same, before, earlier = (s_BG3RTS[:, :, i] for i in range(3))
    apart_BTS = apart_BTS[:, None, None]
    s_BGRTS = jnp.where(apart_BTS == 0, same, jnp.where(apart_BTS == 1, before, earlier))
    p_BGRTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], s_BGRTS, MASKED), -1).astype(v_BGSK.dtype)
    y_BGMK = jnp.einsum("bgms,bgsk->bgmk", jnp.reshape(p_BGRTS, (B, G, R * T, S)), v_BGSK)
    return jnp.reshape(jnp.transpose(jnp.reshape(y_BGMK, (B, G, R, T, -1)), (0, 3, 1, 2, 4)), (B, T, H, -1))
