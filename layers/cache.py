"""Caches of one slot a token: which new tokens are real, and where they go."""

import jax
import jax.numpy as jnp

from layers.context import Context


def real(ctx: Context) -> jax.Array:
    """bool [B, T]: the new tokens that are no padding on the right."""
    B, T = ctx.positions_BT.shape
    if ctx.lengths_B is None:
        return jnp.ones((B, T), bool)
    return jnp.arange(T)[None] < ctx.lengths_B[:, None]


BY_HEAD = (
    "k",
    "v",
)  # entries [B, G, S, K] in a cache, one matrix a head (see `masked_attention`); [B, T, G, K] when new


def write(cache: dict[str, jax.Array], new: dict[str, jax.Array], slot_BT: jax.Array) -> dict[str, jax.Array]:
    """Puts token t of row b of new [B, T, ...] into slot_BT[b, t] of cache [B, S, ...] (BY_HEAD otherwise); a slot past
    the end, which is where padding goes, writes nothing. Entries are cast to the dtype of the cache."""
    row_B1 = jnp.arange(slot_BT.shape[0])[:, None]

    def put(name: str) -> jax.Array:
        place = (row_B1, slot_BT)
        if name in BY_HEAD:
            # Heads by number: with a slice for them XLA on CPU turns the whole cache around at every write (5 times).
            place = (row_B1[..., None], jnp.arange(cache[name].shape[1]), slot_BT[..., None])
        return cache[name].at[place].set(new[name].astype(cache[name].dtype), mode="drop")

    return {name: put(name) for name in cache}


def append(cache: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A cache of S slots with the T new tokens behind it, S + T in all; not written, only to be attended to."""

    def behind(name: str) -> jax.Array:
        later = jnp.swapaxes(new[name], 1, 2) if name in BY_HEAD else new[name]
        return jnp.concatenate([cache[name], later.astype(cache[name].dtype)], 2 if name in BY_HEAD else 1)

    return {name: behind(name) for name in cache}
