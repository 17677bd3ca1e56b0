"""How an optimizer's state is kept between updates: its dtype and its memory."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxlike.errors import UserError

HOST = "pinned_host"


class Moments:
    """The arrays of any optimizer's state (moments, momenta, factors; not its counters), as they lie between updates.
    An update is computed in float32 on the device; parameters stay float32.

    dtype: "float32" or "bfloat16", which halves them. rounding: to bfloat16, "stochastic" (up or down so that the
        expectation is exact; the noise is a function of seed and step) or "nearest", with which a moment of slow decay
        (b2 = 0.999) stands still: its step is less than half of bfloat16's 2^-8.
    memory: "device", or "pinned_host" for the host's memory, from which each update fetches them.

    Raises UserError where the device has no such memory, and for "nearest" where nothing is rounded.
    """

    def __init__(
        self,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        memory: Literal["device", "pinned_host"] = "device",
    ):
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f'Moments.dtype={dtype!r} is unknown: use "float32" or "bfloat16"')
        if rounding not in ("stochastic", "nearest"):
            raise UserError(f'Moments.rounding={rounding!r} is unknown: use "stochastic" or "nearest"')
        if rounding == "nearest" and dtype == "float32":
            raise UserError('Moments.rounding="nearest" rounds nothing: set Moments.dtype="bfloat16" with it')
        if memory not in ("device", HOST):
            raise UserError(f'Moments.memory={memory!r} is unknown: use "device" or "{HOST}"')
        self.dtype, self.rounding, self.memory = dtype, rounding, memory

    def place(self, shardings: Any, state: Any) -> Any:
        """The shardings of an optimizer's abstract state, moved to the memory asked for."""
        if self.memory == "device":
            return shardings
        device = next(iter(jax.tree.leaves(shardings)[0].device_set))
        memories = [memory.kind for memory in device.addressable_memories()]
        if HOST not in memories:
            raise UserError(f'Moments.memory="{HOST}": {device.device_kind} has only {memories}; use "device"')
        return jax.tree.map(lambda s, leaf: s.with_memory_kind(HOST) if _kept(leaf) else s, shardings, state)

    def fetch(self, state: Any) -> Any:
        """The stored state on the device."""
        if self.memory == "device":
            return state
        return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _kept(x) else x, state)

    def unpack(self, state: Any) -> Any:
        """The state that the optimizer computes with: float32."""
        return jax.tree.map(lambda x: x.astype(jnp.float32) if _kept(x) else x, state)

    def pack(self, state: Any, key: jax.Array) -> Any:
        """The state in the dtype that it is stored in."""
        if self.dtype == "float32":
            return state
        leaves, tree = jax.tree.flatten(state)
        packed = [self._round(x, jax.random.fold_in(key, i)) if _kept(x) else x for i, x in enumerate(leaves)]
        return tree.unflatten(packed)

    def _round(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16) if self.rounding == "nearest" else stochastic_bfloat16(x, key)


def stochastic_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two neighbouring bfloat16 numbers, the nearer with the higher probability, so that the
    expectation is x. bfloat16 is the upper half of a float32: add noise to the lower half and cut it off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _kept(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, no counter."""
    return leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
