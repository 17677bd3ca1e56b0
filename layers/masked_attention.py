"""Attention under any mask by its definition, and over chunks of queries for rows too long to hold all scores."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that sees nothing gives junk that nobody reads, not NaN that poisons the gradient


def visibility(q_positions_BT, k_positions_BS, *, causal: bool, window: int | None, prefix_BS=None) -> jax.Array:
    """Mask [B, T, S] of the keys that lie in the past and in the window of each query, by position; a key of the prefix
    need not lie in the past."""
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    visible_BTS = distance_BTS >= 0 if causal else jnp.ones_like(distance_BTS, bool)
    if prefix_BS is not None:
        visible_BTS = visible_BTS | prefix_BS[:, None, :]
    return visible_BTS if window is None else visible_BTS & (jnp.abs(distance_BTS) < window)


def masked_attention(
    q_BTHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    visible_BTS: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: jax.Array | None = None,
    bias_BHTS: jax.Array | None = None,
) -> jax.Array:
    """Attention under any mask, holding all T x S scores: decoding from a cache, where T is small. [B, T, H, K].

    Keys and values lie head by head, as a cache holds them: the keys of a head are then one matrix, and on CPU a
    decoding step reads them as fast as memory gives them (7 times faster than with heads inside positions).
    bias_BHTS is added to the scores; its B may be 1.
    """
    B, T, H, K = q_BTHK.shape
    G, S = k_BGSK.shape[1:3]
    R = H // G
    # Query heads of a key head and new tokens as the rows of one matrix.
    q_BGMK = jnp.reshape(jnp.transpose(jnp.reshape(q_BTHK * scale, (B, T, G, R, K)), (0, 2, 3, 1, 4)), (B, G, R * T, K))
    s = jnp.einsum("bgmk,bgsk->bgms", q_BGMK, k_BGSK, preferred_element_type=jnp.float32)
    s = jnp.reshape(s, (B, G, R, T, S))
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    if bias_BHTS is not None:
        s = s + jnp.reshape(bias_BHTS, (-1, G, R, *bias_BHTS.shape[2:]))
    s = jnp.where(visible_BTS[:, None, None], s, MASKED)
    top = jnp.max(s, -1, keepdims=True)
    sinks = None if sinks_H is None else jnp.reshape(sinks_H.astype(jnp.float32), (1, G, R, 1, 1))
    top = jax.lax.stop_gradient(top if sinks is None else jnp.maximum(top, sinks))
    e = jnp.exp(s - top)
    total = jnp.sum(e, -1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks - top))
    p_BGMS = jnp.reshape((e / total).astype(v_BGSK.dtype), (B, G, R * T, S))
    y_BGMK = jnp.einsum("bgms,bgsk->bgmk", p_BGMS, v_BGSK)
    return jnp.reshape(jnp.transpose(jnp.reshape(y_BGMK, (B, G, R, T, -1)), (0, 3, 1, 2, 4)), (B, T, H, -1))


def chunked_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_H: jax.Array | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    prefix_BT: jax.Array | None = None,
    chunk: int = 256,
) -> jax.Array:
    """Attention of a long row on itself (S = T): scores of one chunk of queries at a time, made anew backwards.

    Memory is chunk x T instead of T x T. Queries run in four quarters, each against the keys that it may see at all, so
    a causal row costs 5/8 of all pairs. y: [B, T, H, K].
    """
    T = q_BTHK.shape[1]
    k_BGTK, v_BGTK = jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGK, 1, 2)
    positions_1T = jnp.arange(T)[None]
    quarter = -(-T // (4 * chunk)) * chunk
    outputs = []
    for start in range(0, T, quarter):
        end = min(start + quarter, T)
        first = 0 if window is None else max(0, start - window + 1)
        backward = causal and prefix_BT is None
        last = end if backward else (T if window is None else min(T, end + window - 1))
        keys = slice(first, last)

        @jax.checkpoint
        def attend(xs, keys=keys):
            q_BCHK, positions_1C, segments_BC = xs
            prefix_BS = None if prefix_BT is None else prefix_BT[:, keys]
            visible_BCS = visibility(
                positions_1C, positions_1T[:, keys], causal=causal, window=window, prefix_BS=prefix_BS
            )
            if segments_BC is not None:
                visible_BCS = visible_BCS & (segments_BC[:, :, None] == segments_BT[:, None, keys])
            k_BGSK, v_BGSK = k_BGTK[:, :, keys], v_BGTK[:, :, keys]
            return masked_attention(
                q_BCHK, k_BGSK, v_BGSK, visible_BCS, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H
            )

        xs = jax.tree.map(lambda x: chunks(x[:, start:end], chunk), (q_BTHK, positions_1T, segments_BT))  # noqa: B023
        y_NBCHK = jax.lax.map(attend, xs)
        y_BCHK = jnp.reshape(jnp.swapaxes(y_NBCHK, 0, 1), (y_NBCHK.shape[1], -1, *y_NBCHK.shape[3:]))
        outputs.append(y_BCHK[:, : end - start])
    return jnp.concatenate(outputs, 1)


def chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], padded with zeros to whole chunks."""
    count = -(-x.shape[1] // chunk)
    x = jnp.pad(x, [(0, 0), (0, count * chunk - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.swapaxes(jnp.reshape(x, (x.shape[0], count, chunk, *x.shape[2:])), 0, 1)
