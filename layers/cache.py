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


def write(cache: dict[str, jax.Array], new: dict[str, jax.Array], slot_BT: jax.Array) -> dict[str, jax.Array]:
    """Puts token t of row b of new [B, T, ...] into slot_BT[b, t] of cache [B, S, ...]; a slot past the end, which is
    where padding goes, writes nothing. Entries are cast to the dtype of the cache."""
    row_B1 = jnp.arange(slot_BT.shape[0])[:, None]
    return {
        name: cache[name].at[row_B1, slot_BT].set(new[name].astype(cache[name].dtype), mode="drop") for name in cache
    }
