"""Multi-head latent attention: keys and values of all heads come from one small latent a token, which is cached."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, kernels, taps
from layers.attention_gate import gated
from layers.cache import real, write
from layers.context import AnyOrder, Context
from layers.linear import Linear
from layers.rope import rotary
from layers.rope2d import RoPE2D


class MLA(nnx.Module, AnyOrder):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), causal.

        q = W_qb norm(W_qa x), or W_q x without query compression;  each head [nope | rope]
        c = norm(W_c x);  [k_nope | v] = W_kb c, W_vb c for each kv head;  k_rope = W_kr x, one for all heads
        y = W_o softmax(scale [q_nope | rotate(q_rope)] . [k_nope | rotate(k_rope)]) v

    x and y: [B, T, D]. aux: the gate's metrics, if any. Tokens see only their own segment.

    Knobs:
        heads H >= 1; kv_heads G, a divisor of H: None for H; fewer are shared as in grouped-query attention
        (Zebra-Llama, arXiv 2505.17272).
        kv_rank, width of the latent c; query_rank, width of the query's, None for no compression. nope_dim, rope_dim:
        unrotated and rotated width of a query and key head; value_dim: width of a value head.
        rope: factory of a rotary embedding for rope_dim numbers, such as RoPE. latent_norm: factory of the norms of
        both latents, such as RMSNorm, or None for none (Zebra-Llama).
        scale > 0 of the scores, None for 1 / sqrt(nope_dim + rope_dim). DeepSeek with YaRN: that times mscale^2, where
        mscale = 0.1 * mscale_all_dim * ln(factor) + 1.
        scale_correction: queries times sqrt(D / query_rank) and the normed latent times sqrt(D / kv_rank), so that
        their variance does not depend on the ranks (LongCat-Flash, arXiv 2509.01322); the shared key is not scaled.
        Maps of latents then start with deviation 1 / sqrt(D), as if they took the whole width.
        gate: factory of an AttentionGate at "g1" or "g5", or None.
    Decoding: the cache holds [c | rotated k_rope], kv_rank + rope_dim numbers a token, and nothing else. A few new
        tokens make no keys and values from it: W_kb is applied to their queries and W_vb to the mixed latents
        ("absorbed"), which is attention with one key head, and the same result. Many new tokens, a prefill, make them
        for the time of the call, where that takes fewer operations.
    Refuses a rank above what its matrices can have, kv_heads that do not divide heads, widths below 1, two-dimensional
        rotary positions, and a gate on keys, queries or values.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        rope: Callable,
        kv_heads: int | None = None,
        query_rank: int | None = None,
        latent_norm: Callable | None = None,
        scale: float | None = None,
        scale_correction: bool = False,
        gate: Callable | None = None,
        rngs: nnx.Rngs,
    ):
        H, G = heads, heads if kv_heads is None else kv_heads
        if H < 1 or G < 1 or H % G:
            raise ValueError(f"MLA.kv_heads={kv_heads} does not divide heads={heads}: use a divisor, or None for heads")
        widths = {"nope_dim": nope_dim, "rope_dim": rope_dim, "value_dim": value_dim, "kv_rank": kv_rank}
        for name, value in widths.items():
            if value < 1:
                raise ValueError(f"MLA.{name}={value} must be at least 1")
        _check_rank("kv_rank", kv_rank, dim, G * (nope_dim + value_dim))
        if query_rank is not None:
            _check_rank("query_rank", query_rank, dim, H * (nope_dim + rope_dim))
        if scale is not None and scale <= 0:
            raise ValueError(f"MLA.scale={scale} must be positive, or None")
        self.nope_dim, self.kv_rank, self.rope_dim = nope_dim, kv_rank, rope_dim
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        self.query_factor = (dim / query_rank) ** 0.5 if scale_correction and query_rank is not None else 1.0
        self.latent_factor = (dim / kv_rank) ** 0.5 if scale_correction else 1.0

        def project(inputs, input_axis, outputs, output_axes):
            std = dim**-0.5 if scale_correction else None
            return Linear((inputs,), outputs, (input_axis,), output_axes, std=std, rngs=rngs)

        query = ((H, nope_dim + rope_dim), ("heads", "head_dim"))
        if query_rank is None:
            self.query_down, self.query = None, project(dim, "embed", *query)
        else:
            self.query_down = project(dim, "embed", (query_rank,), ("latent",))
            self.query = project(query_rank, "latent_in", *query)
        self.latent = project(dim, "embed", (kv_rank,), ("latent",))
        self.shared_key = project(dim, "embed", (rope_dim,), ("head_dim",))
        self.key = project(kv_rank, "latent_in", (G, nope_dim), ("kv_heads", "head_dim"))
        self.value = project(kv_rank, "latent_in", (G, value_dim), ("kv_heads", "head_dim"))
        self.out = Linear((H, value_dim), (dim,), ("heads", "head_dim"), ("embed",), rngs=rngs)
        has_query_norm = latent_norm is not None and query_rank is not None
        self.query_norm = latent_norm(query_rank, rngs=rngs) if has_query_norm else None
        self.latent_norm = None if latent_norm is None else latent_norm(kv_rank, rngs=rngs)
        self.rope = rotary("MLA", rope, rope_dim)
        if isinstance(self.rope, RoPE2D):
            raise ValueError("MLA.rope=RoPE2D needs blocks of a filled-in blank, which MLA does not read: use RoPE")
        self.gate = None if gate is None else gate(dim, H, G, value_dim, rngs=rngs)
        if self.gate is not None and self.gate.position not in ("g1", "g5"):
            raise ValueError(
                f"AttentionGate.position={self.gate.position!r} does not exist in MLA, which caches a latent for all "
                "heads: use 'g1' or 'g5'"
            )

    def _queries(self, x_BTD, positions_BT):
        """Queries [B, T, H, nope + rope], the last rope_dim numbers of each head rotated."""
        z = x_BTD if self.query_down is None else self.query_down(x_BTD)
        z = z if self.query_norm is None else self.query_norm(z)
        q_BTHK = self.query(z) * self.query_factor
        nope, rope = q_BTHK[..., : self.nope_dim], self.rope(q_BTHK[..., self.nope_dim :], positions_BT)
        q_BTHK = axes.constrain(jnp.concatenate([nope, rope], -1), "batch", "length", "act_heads", None)
        return taps.tap("queries", q_BTHK, self)

    def _latents(self, x_BTD, positions_BT):
        """The normed, scaled latent [B, T, kv_rank] and the rotated shared key [B, T, 1, rope_dim]."""
        c_BTR = self.latent(x_BTD)
        c_BTR = c_BTR if self.latent_norm is None else self.latent_norm(c_BTR)
        return c_BTR * self.latent_factor, self.rope(self.shared_key(x_BTD)[:, :, None], positions_BT)

    def _expand(self, c_BSR, shared_BS1K):
        """Keys [B, S, G, nope + rope] and values [B, S, G, value_dim] of every kv head."""
        k_BSGN = self.key(c_BSR)
        shared_BSGK = jnp.broadcast_to(shared_BS1K, (*k_BSGN.shape[:3], self.rope_dim))
        expanded = {"keys": jnp.concatenate([k_BSGN, shared_BSGK], -1), "values": self.value(c_BSR)}
        return tuple(
            taps.tap(name, axes.constrain(z, "batch", "length", "act_heads", None), self)
            for name, z in expanded.items()
        )

    def _finish(self, y_BTHV, x_BTD):
        """(y_BTD, the gate's score): the output projection, with the gates around it."""
        score = None if self.gate is None else self.gate.score(x_BTD)
        y_BTHV = gated(self.gate, "g1", taps.tap("attention_output", y_BTHV, self), score)
        return gated(self.gate, "g5", self.out(taps.tap("gated_output", y_BTHV, self)), score), score

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Keys and values of every head are made: fewest operations where all tokens are new."""
        q_BTHK = self._queries(x_BTD, ctx.positions_BT)
        k_BTGK, v_BTGV = self._expand(*self._latents(x_BTD, ctx.positions_BT))
        y_BTHV = kernels.attention(
            q_BTHK,
            k_BTGK,
            v_BTGV,
            scale=self.scale,
            causal=True,
            segments_BT=ctx.segments_BT,
            order_BT=ctx.order_BT,
        )
        y_BTD, score = self._finish(y_BTHV, x_BTD)
        return y_BTD, {} if self.gate is None else self.gate.metrics(score, ctx)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """An empty cache for rows of at most `length` tokens: [latent | rotated shared key] of each."""
        return {"latent": jnp.zeros((batch, length, self.kv_rank + self.rope_dim), dtype)}

    def extend(
        self, x_BTD: jax.Array, cache: dict[str, jax.Array], ctx: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real, at ctx.positions_BT."""
        c_BTR, shared_BT1K = self._latents(x_BTD, ctx.positions_BT)
        new_BTR, slots = jnp.concatenate([c_BTR, shared_BT1K[:, :, 0]], -1), cache["latent"].shape[1]
        cache = write(cache, {"latent": new_BTR}, jnp.where(real(ctx), ctx.cache_slots_BT, slots))

        q_BTHK = self._queries(x_BTD, ctx.positions_BT)
        latent_BSR = cache["latent"].astype(x_BTD.dtype)
        visible_BTS = kernels.visibility(ctx.cache_slots_BT, jnp.arange(slots)[None], causal=True, window=None)
        # Absorbed, there are no keys and values: a tap on them needs the other way.
        if self._absorbing_is_cheaper(x_BTD.shape[1], slots) and not taps.is_open("keys", "values"):
            q_nope, q_rope = q_BTHK[..., : self.nope_dim], q_BTHK[..., self.nope_dim :]
            q_BTHR = jnp.concatenate([self._absorb_key(q_nope), q_rope], -1)
            # Values are whole entries, and the shared key's part of the result is dropped: slicing would copy a cache.
            y_BTHR = kernels.masked_attention(
                q_BTHR, latent_BSR[:, None], latent_BSR[:, None], visible_BTS, scale=self.scale
            )
            y_BTHV = self._absorb_value(y_BTHR[..., : self.kv_rank])
        else:
            keys_and_values = self._expand(latent_BSR[..., : self.kv_rank], latent_BSR[:, :, None, self.kv_rank :])
            k_BGSK, v_BGSV = (jnp.swapaxes(z, 1, 2) for z in keys_and_values)
            y_BTHV = kernels.masked_attention(q_BTHK, k_BGSK, v_BGSV, visible_BTS, scale=self.scale)
        return self._finish(y_BTHV, x_BTD)[0], cache

    def _absorbing_is_cheaper(self, new: int, slots: int) -> bool:
        """Whether `new` tokens over a cache of `slots` take fewer multiply-adds on latents than on keys and values."""
        heads = self.query.outputs // (self.nope_dim + self.rope_dim)
        key_and_value = self.nope_dim + self.out.inputs // heads  # numbers of a head that are made from latents
        absorbed = new * heads * (2 * slots * (self.kv_rank + self.rope_dim) + self.kv_rank * key_and_value)
        expanded = new * heads * slots * (key_and_value + self.rope_dim)
        expanded += slots * self.kv_rank * (self.key.outputs + self.value.outputs)
        return absorbed <= expanded

    def _absorb_key(self, q_BTHN):
        """W_kb^T q for each head, [B, T, H, kv_rank]: its product with a latent is q . k_nope."""
        w_RGN = self.key.kernel[...]
        q_BTGQN = jnp.reshape(q_BTHN, (*q_BTHN.shape[:2], w_RGN.shape[1], -1, self.nope_dim))
        return jnp.reshape(jnp.einsum("btgqn,rgn->btgqr", q_BTGQN, w_RGN), (*q_BTHN.shape[:3], self.kv_rank))

    def _absorb_value(self, y_BTHR):
        """Mixed latents to mixed values, [B, T, H, value_dim]."""
        w_RGV = self.value.kernel[...]
        y_BTGQR = jnp.reshape(y_BTHR, (*y_BTHR.shape[:2], w_RGV.shape[1], -1, self.kv_rank))
        return jnp.reshape(jnp.einsum("btgqr,rgv->btgqv", y_BTGQR, w_RGV), (*y_BTHR.shape[:3], w_RGV.shape[2]))

    def flops_per_token(self, length: int) -> float:
        """Projections, and scores and mixing over the mean number of visible keys, half the row; as in training."""
        parts = (self.query_down, self.query, self.latent, self.shared_key, self.key, self.value, self.out, self.gate)
        projections = sum(part.flops_per_token() for part in parts if part is not None)
        return projections + 2.0 * (self.query.outputs + self.out.inputs) * length / 2


def _check_rank(name: str, rank: int, inputs: int, outputs: int) -> None:
    if not 1 <= rank <= min(inputs, outputs):
        raise ValueError(
            f"MLA.{name}={rank} must lie between 1 and {min(inputs, outputs)}, the most that a product of {inputs} x "
            f"{outputs} can use"
        )
