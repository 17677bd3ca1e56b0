"""Cross-entropy against a vocabulary, without ever holding the logits of the whole batch.

The gradient of the loss with respect to the logits is known as soon as the logits are: softmax minus one-hot. So the
forward pass of a differentiated call takes one chunk of positions at a time, makes its logits, and turns them at once
into the gradients of the hidden states and of the head; the backward pass only scales those. Nothing is recomputed (a
checkpointed scan would multiply by the head twice), and one chunk of logits is all that is ever alive.

On a mesh every device takes the chunks of its own rows and positions, and the gradient of the head is summed over
devices once, behind the last chunk: left to the compiler it is summed at every chunk. A vocabulary that is spread over
devices stays so: they exchange the largest logit, the normaliser and the target's logit of each position, no logits.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

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


_SUMS = Sums((), (), (), (None,))  # the logical axes of each


def chunk_length(rows: int, length: int, vocab: int) -> int:
    """Positions per chunk of the [rows, length] batch of one device, which makes `vocab` logits of each: CHUNK_BYTES of
    logits, at most length / FEWEST_CHUNKS."""
    return max(1, min(CHUNK_BYTES[kernels.platform()] // (4 * rows * vocab), -(-length // FEWEST_CHUNKS)))


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
    """(sums.nats + z_loss * sums.squared_log_z, sums). The first is differentiable by `hidden_BTD` and by the arrays
    that `logits` closes over; the sums are not.

    logits: hidden [B, c, D] -> float32 [B, c, V], pointwise in B and c: a method of a module or a functools.partial,
    whose arrays are what it closes over. weights_BT: weight of each target, 0 to mask.
    chunk: positions per chunk, for all rows at once; None: by memory. parts_BTM: membership of each target in M parts
    (0 or 1) that are to be summed by themselves; None: no parts.
    """
    hidden_BTD = axes.constrain(hidden_BTD, "batch", "length", "act_embed")
    over = tuple(dict.fromkeys(axes.mesh_axes("batch") + axes.mesh_axes("length")))
    cut = axes.shards("length")
    rows, length = hidden_BTD.shape[0] // axes.shards("batch"), hidden_BTD.shape[1] // cut  # on a device
    if chunk is None:
        with axes.place_with(None):
            vocab = jax.eval_shape(logits, hidden_BTD).shape[-1]
        chunk = cut * chunk_length(rows, length, vocab // axes.shards("act_vocab"))
    chunks = -(-length // max(1, min(chunk // cut, length)))
    size = -(-length // chunks)
    kernels.take("cross_entropy", "chunked", f"{chunks} x {cut * size} positions, gradient made in the forward pass")
    parts_BTM = jnp.zeros((*targets_BT.shape, 0)) if parts_BTM is None else parts_BTM
    batch = (hidden_BTD, targets_BT, weights_BT.astype(jnp.float32), parts_BTM.astype(jnp.float32))
    function, closed_over = _with_arguments(logits, hidden_BTD[:1, :1])
    total, sums = _summed(function, z_loss, chunks, over, batch, closed_over)
    return total, jax.lax.stop_gradient(sums)


def _with_arguments(logits: Callable, hidden: jax.Array) -> tuple[Callable, list[jax.Array]]:
    """(function, arrays) with function(hidden, *arrays) = logits(hidden): the arrays that it reads (the head, a tied
    table) as arguments, so that they get gradients.

    It is traced anew wherever it runs: a jaxpr made outside a shard_map does not run in it once it holds a number or a
    jitted part (a soft cap, the mask of a padded vocabulary).
    """
    if inspect.ismethod(logits):
        logits = functools.partial(logits.__func__, logits.__self__)
    if isinstance(logits, functools.partial):
        logits = jax.tree_util.Partial(logits.func, *logits.args, **logits.keywords)
    leaves, tree = jax.tree.flatten(logits)
    places = [i for i, x in enumerate(leaves) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)]

    def put(arrays: Sequence[jax.Array], at: list[int]) -> Callable:
        given = dict(zip(at, arrays, strict=True))
        # In the place of an array that nothing reads stands one of its shape, without memory.
        unread = {i: np.broadcast_to(np.zeros((), leaves[i].dtype), leaves[i].shape) for i in places}
        return jax.tree.unflatten(tree, [(unread | given).get(i, x) for i, x in enumerate(leaves)])

    with axes.place_with(None):
        jaxpr = jax.make_jaxpr(lambda arrays: put(arrays, places)(hidden))([leaves[i] for i in places]).jaxpr
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    used = [i for i, x in zip(places, jaxpr.invars, strict=True) if id(x) in read]

    def function(hidden: jax.Array, *arrays: jax.Array) -> jax.Array:
        with axes.place_with(None):  # `_of_chunk` places the result
            return put(arrays, used)(hidden)

    return function, [leaves[i] for i in used]


def _cut(x: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], zeros behind the end."""
    size = -(-x.shape[1] // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)


def _chunk(logits, targets, weights, parts):
    """(Sums, exp(logits - largest), its sum Z', log Z) of one chunk of logits [B, c, V]."""
    top = jnp.max(logits, axis=-1)
    exponentials = jnp.exp(logits - top[..., None])
    normaliser = jnp.sum(exponentials, axis=-1)
    log_z = top + jnp.log(normaliser)
    if axes.mesh_axes("act_vocab"):  # XLA's partitioner fails on a look-up along it inside a shard_map
        gold = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)
    else:
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


def _no_sums(hidden: jax.Array, parts: jax.Array) -> Sums:
    return Sums(*(axes.zeros(shape, jnp.float32, like=hidden) for shape in ((), (), (), parts.shape[-1:])))


def _everywhere(local: Callable, over: tuple[str, ...], batch: tuple, closed_over: list, outputs: tuple) -> tuple:
    """local(batch, closed_over), on the devices of the mesh axes `over` each on its rows and positions."""
    if not over:
        return local(batch, closed_over)
    inputs = (tuple(("batch", "length", None)[: x.ndim] for x in batch), [(None,) * x.ndim for x in closed_over])
    return axes.shard_map(local, over=over, inputs=inputs, outputs=outputs)(batch, closed_over)


def _varying(arrays: list, over: tuple[str, ...]) -> list:
    """The same arrays on all devices, each device's to do with as it likes."""
    return [jax.lax.pcast(x, over, to="varying") for x in arrays] if over else arrays


def _of_chunk(function: Callable, hidden: jax.Array, *closed_over: jax.Array) -> jax.Array:
    return axes.constrain(function(hidden, *closed_over), "batch", "length", "act_vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _summed(function, z_loss, chunks, over, batch, closed_over):
    def local(batch, closed_over):
        closed_over = _varying(closed_over, over)

        def body(sums, xs):
            h, *rest = xs
            return jax.tree.map(jnp.add, sums, _chunk(_of_chunk(function, h, *closed_over), *rest)[0]), None

        start = _no_sums(batch[0], batch[3])
        return jax.lax.psum(jax.lax.scan(body, start, [_cut(x, chunks) for x in batch])[0], over)

    sums = _everywhere(local, over, batch, closed_over, _SUMS)
    return _total(sums, z_loss), sums


def _forward(function, z_loss, chunks, over, batch, closed_over):
    def local(batch, closed_over):
        closed_over = _varying(closed_over, over)  # else each chunk would sum its gradients over the devices

        def body(carry, xs):
            sums, head_gradients = carry
            h, t, w, p = xs
            logits, pull = jax.vjp(functools.partial(_of_chunk, function), h, *closed_over)
            here, exponentials, normaliser, log_z = _chunk(logits, t, w, p)
            factor = w * (1.0 + 2.0 * z_loss * log_z) / normaliser
            hit = jnp.arange(logits.shape[-1]) == t[..., None]
            h_gradient, *gradients = pull(exponentials * factor[..., None] - jnp.where(hit, w[..., None], 0.0))
            head_gradients = [total + g.astype(total.dtype) for total, g in zip(head_gradients, gradients, strict=True)]
            return (jax.tree.map(jnp.add, sums, here), head_gradients), h_gradient

        # summed over chunks and devices in float32, whatever dtype the head computes in
        start = (_no_sums(batch[0], batch[3]), [axes.zeros(x.shape, jnp.float32, like=x) for x in closed_over])
        sums, hidden_gradient = jax.lax.scan(body, start, [_cut(x, chunks) for x in batch])
        hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(batch[0].shape[0], -1, batch[0].shape[2])
        return *jax.lax.psum(sums, over), hidden_gradient[:, : batch[0].shape[1]]

    outputs = (_SUMS, [(None,) * x.ndim for x in closed_over], ("batch", "length", None))
    sums, head_gradients, hidden_gradient = _everywhere(local, over, batch, closed_over, outputs)
    head_gradients = [g.astype(x.dtype) for g, x in zip(head_gradients, closed_over, strict=True)]
    return (_total(sums, z_loss), sums), (hidden_gradient, head_gradients)


def _backward(function, z_loss, chunks, over, gradients, cotangents):
    slope, _ = cotangents  # the sums are handed out under stop_gradient
    hidden_gradient, head_gradients = gradients

    def scaled(g):
        return g * slope.astype(g.dtype)

    return (scaled(hidden_gradient), None, None, None), [scaled(g) for g in head_gradients]


_summed.defvjp(_forward, _backward)
