"""Attention over blocks of queries in plain XLA, with a backward pass of its own.

Each block of queries meets only the keys that causality and the window let it see, so a causal row costs little more
than half the products and exponentials. The default backward pass of softmax(QK^T)V recomputes and rescales T x S
arrays several times; this one keeps the unnormalised probabilities and normalises T x K arrays instead. Measured on two
shared CPU cores, interleaved, at B 8, T 256, H 6, K 64, float32: 39 ms forward and backward, 86 ms by
jax.nn.dot_product_attention.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from layers.masked_attention import MASKED


@dataclasses.dataclass(frozen=True)
class Blocking:
    """What is static about one call."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    block: int
    prefix: bool  # some keys are visible ahead of their queries

    def keys_of(self, start: int, end: int, length: int) -> tuple[int, int]:
        """The range of keys that queries start..end-1 may see."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        return (
            (first, end)
            if self.causal and not self.prefix
            else (first, length if self.window is None else min(length, end + self.window - 1))
        )


def _blocks(static: Blocking, length: int) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of every block."""
    spans = [(start, min(start + static.block, length)) for start in range(0, length, static.block)]
    return [(start, end, *static.keys_of(start, end, length)) for start, end in spans]


def _visible(static: Blocking, segments_BT, prefix_BT, span) -> jax.Array | None:
    """Mask [B or 1, 1, 1, t, s] of one block, or None where every key is visible."""
    start, end, first, last = span
    distance = jnp.arange(start, end)[:, None] - jnp.arange(first, last)[None, :]
    allowed = None
    if static.causal:
        allowed = (distance >= 0)[None]
        if prefix_BT is not None:
            allowed = allowed | prefix_BT[:, None, first:last]
    if static.window is not None:
        near = (jnp.abs(distance) < static.window)[None]
        allowed = near if allowed is None else allowed & near
    if segments_BT is not None:
        same = segments_BT[:, start:end, None] == segments_BT[:, None, first:last]
        allowed = same if allowed is None else allowed & same
    return None if allowed is None else allowed[:, None, None]


def _scores(static: Blocking, q_BGRtK, k_BGsK) -> jax.Array:
    """Scaled, capped scores [B, G, R, t, s] in float32; the R query heads of a key head are rows of one product."""
    B, G, R, t, K = q_BGRtK.shape
    rows = jnp.reshape(q_BGRtK, (B, G, R * t, K))
    s = jnp.einsum("bgik,bgsk->bgis", rows, k_BGsK, preferred_element_type=jnp.float32)
    s = jnp.reshape(s, (B, G, R, t, k_BGsK.shape[2]))
    return s if static.soft_cap is None else static.soft_cap * jnp.tanh(s / static.soft_cap)


def _weights(static: Blocking, q, k, segments_BT, prefix_BT, sinks_GR, span):
    """exp(score - top) of one block and the row maximum `top` [B, G, R, t, 1]."""
    start, end, first, last = span
    s = _scores(static, q[:, :, :, start:end] * static.scale, k[:, :, first:last])
    visible = _visible(static, segments_BT, prefix_BT, span)
    if visible is not None:
        s = jnp.where(visible, s, MASKED)
    top = jnp.max(s, -1, keepdims=True)
    if sinks_GR is not None:
        top = jnp.maximum(top, sinks_GR[None, :, :, None, None])
    return jnp.exp(s - top), top


def _rows(x):
    """[B, G, R, t, n] -> [B, G, R*t, n]."""
    return jnp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Blocking, q_BGRTK, k_BGSK, v_BGSK, sinks_GR, segments_BT, prefix_BT):
    return _forward(static, q_BGRTK, k_BGSK, v_BGSK, sinks_GR, segments_BT, prefix_BT)[0]


def _forward(static, q, k, v, sinks_GR, segments_BT, prefix_BT):
    outputs, stored = [], []
    for span in _blocks(static, q.shape[3]):
        start, end, first, last = span
        e, top = _weights(static, q, k, segments_BT, prefix_BT, sinks_GR, span)
        total = jnp.sum(e, -1, keepdims=True)
        if sinks_GR is not None:
            total = total + jnp.exp(sinks_GR[None, :, :, None, None] - top)
        e = e.astype(v.dtype)
        y = jnp.einsum("bgis,bgsk->bgik", _rows(e), v[:, :, first:last], preferred_element_type=jnp.float32)
        y = (jnp.reshape(y, (*q.shape[:3], end - start, v.shape[-1])) / total).astype(v.dtype)
        outputs.append(y)
        stored.append((e, top, total))
    return jnp.concatenate(outputs, 3), (q, k, v, sinks_GR, outputs, stored)


def _backward(static, residuals, dy):
    q, k, v, sinks_GR, outputs, stored = residuals
    dq, dk, dv, dsinks = [], [], [], []
    spans = _blocks(static, q.shape[3])
    for span, y, (e, top, total) in zip(spans, outputs, stored, strict=True):
        start, end, first, last = span
        g = dy[:, :, :, start:end].astype(jnp.float32) / total  # dividing T x K here spares dividing T x S
        delta = jnp.sum(g * y.astype(jnp.float32), -1, keepdims=True)
        g = g.astype(v.dtype)
        dv.append(jnp.einsum("bgis,bgik->bgsk", _rows(e), _rows(g)))
        dp = jnp.einsum("bgik,bgsk->bgis", _rows(g), v[:, :, first:last], preferred_element_type=jnp.float32)
        ds = e.astype(jnp.float32) * (jnp.reshape(dp, e.shape) - delta)
        if static.soft_cap is not None:
            s = _scores(static, q[:, :, :, start:end] * static.scale, k[:, :, first:last])
            ds = ds * (1 - jnp.square(s / static.soft_cap))
        ds = _rows(ds.astype(q.dtype))
        dq_rows = jnp.einsum("bgis,bgsk->bgik", ds, k[:, :, first:last]) * static.scale
        dq.append(jnp.reshape(dq_rows, (*q.shape[:3], end - start, q.shape[-1])))
        dk.append(jnp.einsum("bgis,bgik->bgsk", ds, _rows(q[:, :, :, start:end] * static.scale)))
        if sinks_GR is not None:
            dsinks.append(-jnp.sum(jnp.exp(sinks_GR[None, :, :, None, None] - top) * delta, (0, 3, 4)))
    dsinks = None if sinks_GR is None else functools.reduce(jnp.add, dsinks).astype(sinks_GR.dtype)
    dk, dv = (_sum_spans(parts, spans, k.shape[2]) for parts in (dk, dv))
    return jnp.concatenate(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None, None


def _sum_spans(parts, spans, length: int) -> jax.Array:
    """Adds what each block of queries owes to its range of keys."""
    total = jnp.zeros((*parts[0].shape[:2], length, parts[0].shape[3]), parts[0].dtype)
    for part, (_, _, first, last) in reversed(list(zip(parts, spans))):
        if last - first == length and part is parts[-1]:
            total = part
        else:
            total = jax.lax.dynamic_update_slice_in_dim(total, total[:, :, first:last] + part, first, 2)
    return total


_attend.defvjp(_forward, _backward)


def blocked_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_H: jax.Array | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    prefix_BT: jax.Array | None = None,
) -> jax.Array:
    """Attention of a row on itself (S = T): y [B, T, H, K] in the dtype of v."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    # 64 queries a block wins on the CPU at 256; more blocks than 16 only lengthen the compilation.
    block = max(64, -(-T // 16))
    static = Blocking(scale, causal, window, soft_cap, block, prefix_BT is not None)
    q_BGRTK = jnp.transpose(jnp.reshape(q_BTHK, (B, T, G, H // G, K)), (0, 2, 3, 1, 4))
    k_BGSK, v_BGSK = jnp.swapaxes(k_BSGK, 1, 2), jnp.swapaxes(v_BSGK, 1, 2)
    sinks_GR = None if sinks_H is None else jnp.reshape(sinks_H.astype(jnp.float32), (G, H // G))
    y_BGRTK = _attend(static, q_BGRTK, k_BGSK, v_BGSK, sinks_GR, segments_BT, prefix_BT)
    return jnp.reshape(jnp.transpose(y_BGRTK, (0, 3, 1, 2, 4)), (B, T, H, v_BSGK.shape[-1]))
