"""Attention written from its definition, one query at a time: no blocks, no custom derivative, no grouping trick."""

import jax.numpy as jnp


def attention(q_BTHK, k_BSGK, v_BSGK, *, scale, causal, window=None, soft_cap=None, segments_BT=None, sinks_H=None):
    """softmax over the keys that each query may see; the sink takes its share of the probability and gives no value."""
    B, T, H, _ = q_BTHK.shape
    G = k_BSGK.shape[2]
    rows = []
    for h in range(H):
        k_BSK, v_BSK = k_BSGK[:, :, h // (H // G)], v_BSGK[:, :, h // (H // G)]
        score_BTS = scale * jnp.einsum("btk,bsk->bts", q_BTHK[:, :, h], k_BSK)
        if soft_cap is not None:
            score_BTS = soft_cap * jnp.tanh(score_BTS / soft_cap)
        t, s = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
        seen = (s <= t) | (not causal)
        if window is not None:
            seen = seen & (t - s < window) & (s - t < window)
        seen = jnp.broadcast_to(seen, (B, T, T))
        if segments_BT is not None:
            seen = seen & (segments_BT[:, :, None] == segments_BT[:, None, :])
        weight_BTS = jnp.where(seen, jnp.exp(score_BTS), 0.0)
        total_BT1 = weight_BTS.sum(-1, keepdims=True)
        if sinks_H is not None:
            total_BT1 = total_BT1 + jnp.exp(sinks_H[h])
        rows.append(jnp.einsum("bts,bsk->btk", weight_BTS / total_BT1, v_BSK))
    return jnp.stack(rows, 2)
