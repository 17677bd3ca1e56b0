"""Choosing tokens within static shapes: the best by a score, or the ones a mask keeps."""

import fractions
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers import axes
from layers.cache import real
from layers.context import Context


def real_tokens(ctx: Context) -> jax.Array:
    """Bool [B, T]: which tokens are none of the padding, neither of a batch nor of a ragged step of decoding."""
    return real(ctx) if ctx.segments_BT is None else real(ctx) & (ctx.segments_BT > 0)


def share(count: jax.Array, fraction: float) -> jax.Array:
    """floor(count * fraction) of int32 counts, exact for fractions with denominators to 10,000 (a float product would
    give 28 for 0.29 * 100)."""
    ratio = fractions.Fraction(fraction).limit_denominator(10_000)
    whole, rest = count // ratio.denominator, count % ratio.denominator
    return whole * ratio.numerator + rest * ratio.numerator // ratio.denominator


def best(scores: jax.Array, count: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """(index, taken), both [..., slots]: where the `slots` largest of scores [..., N] lie, best first, and which of
    them are among the `count` [...] best. Equal scores go to the lower index; a score of -inf comes last."""
    order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1, stable=True)
    return order[..., :slots], jnp.arange(slots) < count[..., None]


def marked(index: jax.Array, taken: jax.Array, length: int) -> jax.Array:
    """Bool [..., length]: True at the places [..., slots] that index names where taken."""

    def one(index, taken):
        return jnp.zeros(length, bool).at[index].set(taken, mode="drop")

    for _ in range(index.ndim - 1):  # row by row, so that rows on different devices stay there
        one = jax.vmap(one)
    return one(index, taken)


def by_device(choose: Callable[[jax.Array], jax.Array], x: jax.Array, *along: str) -> jax.Array:
    """choose(x), which leaves the first dimensions of x, the logical axes `along`, in front and treats their elements
    one by one: each device has its own. (The compiler gathers the whole batch for a top_k.)"""
    over = tuple(dict.fromkeys(name for axis in ("batch", "length") for name in axes.mesh_axes(axis)))
    if not over:
        return choose(x)
    x = axes.constrain(x, *along, *(None,) * (x.ndim - len(along)))
    result = jax.eval_shape(choose, x)
    names, results = ((*along, *(None,) * (z.ndim - len(along))) for z in (x, result))
    return axes.shard_map(choose, over=over, inputs=(names,), outputs=results)(x)


def compact(keep_BT: jax.Array, slots: int) -> jax.Array:
    """int32 [B, slots]: the indices that keep_BT keeps, ascending, then T (nobody) in the slots that are left."""
    T = keep_BT.shape[1]
    index_BT = jnp.sort(jnp.where(keep_BT, jnp.arange(T, dtype=jnp.int32), T), axis=1)
    return index_BT[:, :slots]
