"""Attention of rows whose length is cut over devices: keys and values go round a ring, or are gathered whole.

Ring (Liu et al. 2023, arXiv 2310.01889): every device keeps its queries, meets the keys and values that it holds, and
passes them to the next device while it computes; after C - 1 hops each query has met every key. The softmax is online
(running maximum, normaliser and weighted values, float32). The backward pass keeps queries, keys, values, outputs and
log-normalisers alone: keys and values go round once more, followed by the sums of their gradients, which come home
with a last hop. A device sends in a forward pass (C - 1) / C times the bytes of the row's keys and values, and in a
backward pass that again and C / C times the bytes of their float32 gradients.

Gathered: all keys and values at once, then the same arithmetic without hops: one collective instead of C - 1, for C
times the memory.

Which pairs meet is decided by what tokens carry: their place in the row, segment and prefix flag. Blocks of queries and
keys that hold no visible pair are skipped, so that with rows in head-tail order (`Context.order_BT`) every device has
the same work under causality.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers import axes
from layers.masked_attention import MASKED

BLOCK = 512  # tokens a side of the scores that exist at a time
TINY = 1e-30  # normaliser of a query that sees nothing


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What is static about one call. ring: mesh axes that keys go round, `hops` times over `size` devices; tags: what
    tokens carry beside their place; queries, keys: tokens a block."""

    ring: tuple[str, ...]
    size: int
    hops: int
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    tags: tuple[str, ...]
    queries: int
    keys: int

    def visible(self, q_tags_BnT: jax.Array, k_tags_BnS: jax.Array) -> jax.Array:
        """Bool [B, T, S]."""
        q = {name: q_tags_BnT[:, i, :, None] for i, name in enumerate(self.tags)}
        k = {name: k_tags_BnS[:, i, None, :] for i, name in enumerate(self.tags)}
        distance_BTS = q["order"] - k["order"]
        seen_BTS = distance_BTS >= 0 if self.causal else jnp.ones_like(distance_BTS, bool)
        if "prefix" in self.tags:
            seen_BTS = seen_BTS | (k["prefix"] > 0)
        if self.window is not None:
            seen_BTS = seen_BTS & (jnp.abs(distance_BTS) < self.window)
        return seen_BTS & (q["segment"] == k["segment"]) if "segment" in self.tags else seen_BTS

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Capped scores [B, G, R, t, s] in float32; queries carry their scale."""
        s = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
        return s if self.soft_cap is None else self.soft_cap * jnp.tanh(s / self.soft_cap)

    def rotate(self, tree, by: int):
        """Everything to the device `by` places on."""
        places = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.ring, places), tree)

    def split(self, x: jax.Array, size: int, axis: int) -> jax.Array:
        """Blocks of `size` tokens of `axis` on a new leading axis."""
        shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.reshape(x, shape), axis, 0)


def _join(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `Meeting.split`."""
    x = jnp.moveaxis(x, 0, axis)
    return jnp.reshape(x, (*x.shape[:axis], -1, *x.shape[axis + 2 :]))


def _split_keys(m: Meeting, k, v, tags):
    return m.split(k, m.keys, 2), m.split(v, m.keys, 2), m.split(tags, m.keys, 2)


def _meet(m: Meeting, queries, sums, keys):
    """Adds what one shard of keys gives to the online softmax: (weighted values, running maximum, normaliser)."""
    keys = _split_keys(m, *keys)

    def of_queries(_, xs):
        q, q_tags, *sums = xs

        def of_keys(sums, xs):
            k, v, k_tags = xs
            visible = m.visible(q_tags, k_tags)

            def add(mixed, top, total):
                seen = visible[:, None, None]
                s = jnp.where(seen, m.scores(q, k), MASKED)
                new = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
                p, old = jnp.where(seen, jnp.exp(s - new), 0.0), jnp.exp(top - new)
                here = jnp.einsum("bgrts,bgsv->bgrtv", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
                return mixed * old + here, new, total * old + jnp.sum(p, -1, keepdims=True)

            return jax.lax.cond(jnp.any(visible), add, lambda *same: same, *sums), None

        return None, jax.lax.scan(of_keys, tuple(sums), keys)[0]

    return jax.lax.scan(of_queries, None, (*queries, *sums))[1]


def _forward(m: Meeting, q_BGRTK, k_BGSK, v_BGSV, sinks_GR, q_tags_BnT, k_tags_BnS):
    q = m.split((q_BGRTK * m.scale).astype(q_BGRTK.dtype), m.queries, 3)
    queries = (q, m.split(q_tags_BnT, m.queries, 2))
    one = axes.zeros((*q.shape[:5], 1), jnp.float32, like=q)
    sums = (axes.zeros((*q.shape[:5], v_BGSV.shape[-1]), jnp.float32, like=q), one + MASKED, one)

    def hop(carry, _):
        sums, keys = carry
        following = m.rotate(keys, 1)
        return (_meet(m, queries, sums, keys), following), None

    keys = (k_BGSK, v_BGSV, k_tags_BnS)
    if m.hops:
        (sums, keys), _ = jax.lax.scan(hop, (sums, keys), None, length=m.hops)
    mixed, top, total = (_join(x, 3) for x in _meet(m, queries, sums, keys))
    if sinks_GR is not None:
        sink = sinks_GR[None, :, :, None, None]
        new = jnp.maximum(top, sink)
        mixed, total, top = mixed * jnp.exp(top - new), total * jnp.exp(top - new) + jnp.exp(sink - new), new
    total = jnp.maximum(total, TINY)
    y = (mixed / total).astype(v_BGSV.dtype)
    return y, (q_BGRTK, k_BGSK, v_BGSV, sinks_GR, q_tags_BnT, k_tags_BnS, y, top + jnp.log(total))


def _meet_back(m: Meeting, queries, dq, keys, dkeys):
    """Adds what one shard of keys owes to the gradients of the queries, and the reverse."""
    keys, dkeys = _split_keys(m, *keys), tuple(m.split(x, m.keys, 2) for x in dkeys)

    def of_keys(dq, xs):
        k, v, k_tags, dk, dv = xs

        def of_queries(dkeys, xs):
            q, q_tags, dy, log_total, delta, dq = xs
            visible = m.visible(q_tags, k_tags)

            def add(dk, dv, dq):
                s = m.scores(q, k)
                p = jnp.where(visible[:, None, None], jnp.exp(s - log_total), 0.0)
                dv = dv + jnp.einsum("bgrts,bgrtv->bgsv", p.astype(dy.dtype), dy, preferred_element_type=jnp.float32)
                ds = p * (jnp.einsum("bgrtv,bgsv->bgrts", dy, v, preferred_element_type=jnp.float32) - delta)
                if m.soft_cap is not None:
                    ds = ds * (1 - jnp.square(s / m.soft_cap))
                ds = ds.astype(q.dtype)
                dk = dk + jnp.einsum("bgrts,bgrtk->bgsk", ds, q, preferred_element_type=jnp.float32)
                dq = dq + jnp.einsum("bgrts,bgsk->bgrtk", ds, k, preferred_element_type=jnp.float32)
                return dk, dv, dq

            *dkeys, dq = jax.lax.cond(jnp.any(visible), add, lambda *same: same, *dkeys, dq)
            return tuple(dkeys), dq

        dkeys, dq = jax.lax.scan(of_queries, (dk, dv), (*queries, dq))
        return dq, dkeys

    dq, dkeys = jax.lax.scan(of_keys, dq, (*keys, *dkeys))
    return dq, tuple(_join(x, 2) for x in dkeys)


def _backward(m: Meeting, residuals, dy):
    q_BGRTK, k_BGSK, v_BGSV, sinks_GR, q_tags_BnT, k_tags_BnS, y, log_total = residuals
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    q = (q_BGRTK * m.scale).astype(q_BGRTK.dtype)
    queries = [m.split(x, m.queries, 3) for x in (q, dy, log_total, delta)]
    queries.insert(1, m.split(q_tags_BnT, m.queries, 2))
    dq = axes.zeros(queries[0].shape, jnp.float32, like=q)
    dkeys = tuple(axes.zeros(x.shape, jnp.float32, like=x) for x in (k_BGSK, v_BGSV))

    def hop(carry, _):
        dq, keys, dkeys = carry
        following = m.rotate(keys, 1)
        dq, dkeys = _meet_back(m, queries, dq, keys, dkeys)
        return (dq, following, m.rotate(dkeys, 1)), None

    keys = (k_BGSK, v_BGSV, k_tags_BnS)
    if m.hops:
        (dq, keys, dkeys), _ = jax.lax.scan(hop, (dq, keys, dkeys), None, length=m.hops)
    dq, dkeys = _meet_back(m, queries, dq, keys, dkeys)
    if m.hops:
        dkeys = m.rotate(dkeys, -m.hops)
    dsinks = None
    if sinks_GR is not None:
        dsinks = -jnp.sum(jnp.exp(sinks_GR[None, :, :, None, None] - log_total) * delta, (0, 3, 4))
    dq = (_join(dq, 3) * m.scale).astype(q.dtype)
    return dq, dkeys[0].astype(k_BGSK.dtype), dkeys[1].astype(v_BGSV.dtype), dsinks, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(m: Meeting, q_BGRTK, k_BGSK, v_BGSV, sinks_GR, q_tags_BnT, k_tags_BnS):
    return _forward(m, q_BGRTK, k_BGSK, v_BGSV, sinks_GR, q_tags_BnT, k_tags_BnS)[0]


_attend.defvjp(_forward, _backward)


def _block(length: int, ordered: bool) -> int:
    """Tokens a block: the largest divisor, up to BLOCK, of a shard or, of one in head-tail order, of its half; all of
    it where only small ones divide."""
    whole = length // 2 if ordered and length % 2 == 0 else length
    best = next(n for n in range(min(whole, BLOCK), 0, -1) if whole % n == 0)
    return best if best >= min(whole, BLOCK // 8) else whole


def ring_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    segments_BT: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    prefix_BT: jax.Array | None = None,
    order_BT: jax.Array | None = None,
    gather: bool = False,
) -> jax.Array:
    """`layers.kernels.attention` of rows of whose length each device of a mesh holds a part: [B, T, H, V].

    order_BT: int32, the place of each token in its row; None where devices hold consecutive parts in order, in which
    case a causal window takes only the hops that it reaches over (with a prefix, which is seen from before it, all).
    gather: whether keys and values are gathered whole. Without a mesh that cuts the length it is plain attention by
    blocks.
    """
    ring, over = axes.mesh_axes("length"), _operands()
    heads, row = ("batch", "length", "act_heads", None), ("batch", "length")
    named = {
        "q": (q_BTHK, heads),
        "k": (k_BTGK, heads),
        "v": (v_BTGV, heads),
        "order": (order_BT, row),
        "segment": (segments_BT, row),
        "prefix": (prefix_BT, row),
        "sinks": (sinks_H, ("act_heads",)),
    }
    arrays = {name: x for name, (x, _) in named.items() if x is not None}
    knobs = {"scale": scale, "causal": causal, "window": window, "soft_cap": soft_cap}

    def local(arrays):
        return _local(arrays, ring=ring, gather=gather, **knobs)

    if not over:
        return local(arrays)
    specs = {name: named[name][1] for name in arrays}
    return axes.shard_map(local, over=over, inputs=(specs,), outputs=heads)(arrays)


def _local(x: dict[str, jax.Array], *, ring: tuple[str, ...], gather: bool, **knobs) -> jax.Array:
    """What one device does."""
    B, T, H, K = x["q"].shape
    G = x["k"].shape[2]
    size = jax.lax.axis_size(ring) if ring else 1
    block, given = _block(T, "order" in x), {*x}
    if "order" not in x:
        x["order"] = (jax.lax.axis_index(ring) * T if ring else 0) + jnp.broadcast_to(jnp.arange(T), (B, T))
    tags = tuple(name for name in ("order", "segment", "prefix") if name in x)
    q_BGRTK = jnp.transpose(jnp.reshape(x["q"], (B, T, G, H // G, K)), (0, 2, 3, 1, 4))
    k, v = jnp.swapaxes(x["k"], 1, 2), jnp.swapaxes(x["v"], 1, 2)
    # What heads share enters the loops as varying over their devices too.
    tags_BnT = jnp.stack([x[name].astype(jnp.int32) for name in tags], 1)
    tags_BnT = tags_BnT + axes.zeros((), jnp.int32, like=q_BGRTK)
    sinks_GR = None
    if "sinks" in x:
        sinks_GR = jnp.reshape(x["sinks"].astype(jnp.float32), (G, H // G)) + axes.zeros((), jnp.float32, like=q_BGRTK)
    hops, k_tags_BnS = size - 1, tags_BnT
    if gather and ring:
        k, v, k_tags_BnS = (jax.lax.all_gather(z, ring, axis=2, tiled=True) for z in (k, v, tags_BnT))
        hops = 0
    elif knobs["causal"] and knobs["window"] is not None and not {"order", "prefix"} & given:
        hops = min(hops, -(-(knobs["window"] - 1) // T))
    m = Meeting(ring=ring, size=size, hops=hops, tags=tags, queries=block, keys=block, **knobs)
    y_BGRTV = _attend(m, q_BGRTK, k, v, sinks_GR, tags_BnT, k_tags_BnS)
    return jnp.reshape(jnp.transpose(y_BGRTV, (0, 3, 1, 2, 4)), (B, T, H, v.shape[-1]))


def over_all_keys(function: Callable, queries: Any, keys: Any) -> jax.Array:
    """function(queries, keys) -> y [B, T, H, V] of rows that a mesh may cut: each device has its own queries and the
    keys of whole rows, gathered.

    queries, keys: trees of arrays [B, T] and [B, T, heads, width], without None.
    """
    cut, heads = axes.mesh_axes("length"), ("batch", "length", "act_heads", None)
    if not cut:
        return function(queries, keys)
    arrays, over = {"queries": queries, "keys": keys}, _operands()

    def local(arrays):
        gather = functools.partial(jax.lax.all_gather, axis_name=cut, axis=1, tiled=True)
        return function(arrays["queries"], jax.tree.map(gather, arrays["keys"]))

    places = jax.tree.map(lambda x: heads[: x.ndim], arrays)
    return axes.shard_map(local, over=over, inputs=(places,), outputs=heads)(arrays)


def _operands() -> tuple[str, ...]:
    """Every mesh axis that cuts a query, key or value. Manual over all of them, a device skips blocks by itself, and
    nothing is left to the compiler that it might hold whole on every device."""
    return tuple(dict.fromkeys(m for axis in ("batch", "length", "act_heads") for m in axes.mesh_axes(axis)))
