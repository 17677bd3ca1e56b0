"""Micro-batches of a batch whose rows lie on stages: cutting it, putting it together, and the Context of each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.context import Context


def check_rows(knob: str, micro_batches: int, B: int) -> None:
    """Raises ValueError where the micro-batches do not divide the B rows, naming `knob`."""
    if B % micro_batches:
        raise ValueError(f"{knob}={micro_batches} does not divide the {B} rows of a batch: change one of the two")


# Rows go between stages by ppermute. Its backward pass is another one; that of an all_gather would be a sum of devices
# in the dtype of the rows, which XLA's CPU backend cannot compile in bfloat16 inside a shard_map. And for an all_to_all
# over the stages alone the compiler first brings the rows of all other batch axes together on every device.


def cut_rows(x_B: jax.Array, over: tuple[str, ...], micro_batches: int) -> jax.Array:
    """A stage's rows [B / S, ...] -> [M, B / M, ...], all rows of all stages. Every device of the other batch axes
    holds its share of every micro-batch."""
    S, stage = jax.lax.axis_size(over), jax.lax.axis_index(over)
    from_SB = jnp.zeros((S, *x_B.shape), x_B.dtype).at[stage].set(x_B)
    for k in range(1, S):
        got_B = jax.lax.ppermute(x_B, over, [(s, (s + k) % S) for s in range(S)])
        from_SB = from_SB.at[(stage - k) % S].set(got_B)
    x_BS = jnp.swapaxes(from_SB, 0, 1)
    return _cut(jnp.reshape(x_BS, (-1, *x_BS.shape[2:])), micro_batches)


def _cut(x_B: jax.Array, micro_batches: int) -> jax.Array:
    """Micro-batch m takes the rows m, M + m, 2 M + m, ..."""
    return jnp.reshape(x_B, (-1, micro_batches, *x_B.shape[1:])).swapaxes(0, 1)


def join_rows(x_MB: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """The inverse of `cut_rows`: of the first stage's [M, B / M, ...] each stage its rows."""
    S, stage = jax.lax.axis_size(over), jax.lax.axis_index(over)
    x_B = jnp.reshape(x_MB.swapaxes(0, 1), (-1, *x_MB.shape[2:]))
    x_BS = jnp.reshape(x_B, (-1, S, *x_B.shape[1:]))
    own_B = x_BS[:, 0]
    for k in range(1, S):
        own_B = jnp.where(stage == k, jax.lax.ppermute(x_BS[:, k], over, [(0, k)]), own_B)
    return own_B


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A Context in parts: what is of an example, cut into micro-batches, and what is of all of them.

    rows: leaves with a leading batch dimension, [B / S, ...], after `gather` [M, B / M, ...]; None in the place of the
    others. shared: the others. keys_M: a key for each micro-batch, or None.
    """

    rows: list[Any]
    shared: list[Any]
    keys_M: jax.Array | None
    tree: Any = dataclasses.field(metadata={"static": True})
    micro_batches: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, ctx: Context, B: int, micro_batches: int, knob: str) -> "Rows":
        check_rows(knob, micro_batches, B)
        leaves, tree = jax.tree.flatten(ctx.replace(key=None, layer=None))
        by_example = [leaf.shape[0] == B for leaf in leaves]
        rows = [leaf if its else None for leaf, its in zip(leaves, by_example)]
        shared = [None if its else leaf for leaf, its in zip(leaves, by_example)]
        return cls(rows, shared, split_key(ctx.key, micro_batches), tree, micro_batches)

    def places(self) -> "Rows":
        """Logical axes for `axes.shard_map`."""
        return dataclasses.replace(self, rows=("batch",), shared=(), keys_M=())

    def gather(self, over: tuple[str, ...]) -> "Rows":
        """All rows of all stages, in micro-batches."""
        return dataclasses.replace(
            self, rows=[cut_rows(x, over, self.micro_batches) if x is not None else None for x in self.rows]
        )

    def context(self, m: jax.Array) -> Context:
        """Of micro-batch m."""
        leaves = [whole if x is None else x[m] for x, whole in zip(self.rows, self.shared)]
        return jax.tree.unflatten(self.tree, leaves).replace(key=None if self.keys_M is None else self.keys_M[m])


def split_key(key: jax.Array | None, micro_batches: int) -> jax.Array | None:
    """A key for each micro-batch, [M], as `Step.micro_batches` splits it."""
    if key is None:
        return None
    return key[None] if micro_batches == 1 else jax.random.split(key, micro_batches)
