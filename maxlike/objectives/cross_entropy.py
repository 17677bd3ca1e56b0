"""Cross-entropy against a vocabulary, without ever holding the logits of the whole batch.

The gradient of the loss with respect to the logits is known as soon as the logits are: softmax minus one-hot. So the
forward pass of a differentiated call takes one chunk of positions at a time, makes its logits, and turns them at once
into the gradients of the hidden states and of the head; the backward pass only scales those. Nothing is recomputed (a
checkpointed scan would multiply by the head twice), and one chunk of logits is all that is ever alive.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers import axes, kernels

# Float32 logits of a chunk on one device, when its length is chosen by memory. A CPU wants them in its cache; elsewhere
# small chunks would spend their time adding up gradients of the head.
CHUNK_BYTES = {"cpu": 1 << 25, "gpu": 1 << 30, "tpu": 1 << 30}
FEWEST_CHUNKS = 4


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["nats", "squared_log_z", "correct", "nats_M"], meta_fields=[]
)
@dataclasses.dataclass
class Sums:
    """Weighted sums over all positions, float32 scalars: -log p(target), log(Z)^2 of the softmax's normaliser Z, and
    targets whose logit is the largest (a tie counts); nats_M: the first again, for each part of the positions."""

    nats: jax.Array
    squared_log_z: jax.Array
    correct: jax.Array
    nats_M: jax.Array


def chunk_length(rows: int, length: int, vocab: int) -> int:
    """Positions per chunk of a [rows, length] batch: CHUNK_BYTES of logits a device, at most length / FEWEST_CHUNKS."""
    budget = CHUNK_BYTES[kernels.platform()] * axes.devices()
    return max(1, min(budget // (4 * rows * vocab), -(-length // FEWEST_CHUNKS)))


def cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float,
    chunk: int | None,
    parts_BTM: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """(sums.nats + z_loss * sums.squared_log_z, sums). The first is differentiable by `hidden_BTD` and by whatever
    arrays `logits` closes over; the sums are not.

    logits: hidden [B, c, D] -> float32 [B, c, V], pointwise in B and c. weights_BT: weight of each target, 0 to mask.
    chunk: positions per chunk, for all rows at once; None: by memory. parts_BTM: membership of each target in M parts
    (0 or 1) that are to be summed by themselves; None: no parts.
    """
    B, T, _ = hidden_BTD.shape
    if chunk is None:
        vocab = jax.eval_shape(logits, jax.ShapeDtypeStruct((B, 1, hidden_BTD.shape[2]), hidden_BTD.dtype)).shape[-1]
        chunk = chunk_length(B, T, vocab)
    chunks = -(-T // min(chunk, T))
    pad = -T % chunks
    kernels.take(
        "cross_entropy", "chunked", f"{chunks} x {(T + pad) // chunks} positions, gradient made in the forward pass"
    )
    cut = functools.partial(_cut, chunks=chunks, pad=pad)
    hidden, targets, weights = cut(hidden_BTD), cut(targets_BT), cut(weights_BT.astype(jnp.float32))
    parts = cut(jnp.zeros((B, T, 0), jnp.float32) if parts_BTM is None else parts_BTM.astype(jnp.float32))
    # Arrays that `logits` closes over (the head, a tied table) become arguments, so that they get gradients.
    function, closed_over = jax.closure_convert(logits, hidden[0])
    total, sums = _summed(function, z_loss, hidden, targets, weights, parts, closed_over)
    return total, jax.lax.stop_gradient(sums)


def _cut(x: jax.Array, *, chunks: int, pad: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]. A chunk takes every chunks-th position, not neighbours: where the
    length is spread over devices each of them then holds its share of every chunk."""
    x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // chunks, chunks, *x.shape[2:]), 2, 0)


def _chunk(logits, targets, weights, parts):
    """(Sums, exp(logits - largest), its sum Z', log Z) of one chunk of logits [B, c, V]."""
    top = jnp.max(logits, axis=-1)
    exponentials = jnp.exp(logits - top[..., None])
    normaliser = jnp.sum(exponentials, axis=-1)
    log_z = top + jnp.log(normaliser)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    def weighted(x):
        return jnp.where(weights != 0, x, 0.0) * weights  # a masked target may be no token at all

    nats = weighted(log_z - gold)
    correct = weighted((gold >= top).astype(jnp.float32))
    nats_M = jnp.sum(nats[..., None] * parts, (0, 1))
    sums = Sums(jnp.sum(nats), jnp.sum(weighted(jnp.square(log_z))), jnp.sum(correct), nats_M)
    return sums, exponentials, normaliser, log_z


def _total(sums: Sums, z_loss: float) -> jax.Array:
    return sums.nats + z_loss * sums.squared_log_z


def _zero(parts) -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)), jnp.zeros(parts.shape[-1], jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(function, z_loss, hidden, targets, weights, parts, closed_over):
    def body(sums, xs):
        h, *rest = xs
        return jax.tree.map(jnp.add, sums, _chunk(function(h, *closed_over), *rest)[0]), None

    sums, _ = jax.lax.scan(body, _zero(parts), (hidden, targets, weights, parts))
    return _total(sums, z_loss), sums


def _forward(function, z_loss, hidden, targets, weights, parts, closed_over):
    def body(carry, xs):
        sums, head_gradients = carry
        h, t, w, p = xs
        logits, pull = jax.vjp(function, h, *closed_over)
        here, exponentials, normaliser, log_z = _chunk(logits, t, w, p)
        factor = w * (1.0 + 2.0 * z_loss * log_z) / normaliser
        hit = jnp.arange(logits.shape[-1]) == t[..., None]
        h_gradient, *gradients = pull(exponentials * factor[..., None] - jnp.where(hit, w[..., None], 0.0))
        head_gradients = [total + g.astype(total.dtype) for total, g in zip(head_gradients, gradients, strict=True)]
        return (jax.tree.map(jnp.add, sums, here), head_gradients), h_gradient

    # summed over chunks in float32, whatever dtype the head computes in
    zeros = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in closed_over]
    start = (_zero(parts), zeros)
    (sums, head_gradients), hidden_gradient = jax.lax.scan(body, start, (hidden, targets, weights, parts))
    head_gradients = [g.astype(x.dtype) for g, x in zip(head_gradients, closed_over, strict=True)]
    return (_total(sums, z_loss), sums), (hidden_gradient, head_gradients)


def _backward(function, z_loss, gradients, cotangents):
    slope, _ = cotangents  # the sums are handed out under stop_gradient
    hidden_gradient, head_gradients = gradients

    def scaled(g):
        return g * slope.astype(g.dtype)

    return scaled(hidden_gradient), None, None, None, [scaled(g) for g in head_gradients]


_summed.defvjp(_forward, _backward)
