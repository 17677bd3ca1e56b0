"""Experts on devices: each device routes its own tokens, rows travel to the device of their expert and back.

Without a mesh nothing here does anything. Under one, every function of tokens and experts runs inside a shard_map over
the mesh axes that cut the batch, the length, the experts or their width:

- tokens stay where they lie: each device sorts its own, whether or not experts are spread;
- weights that lie in parts (FSDP) are gathered whole along the model width, and never along the axis of the experts:
  their gradients are summed over the devices that hold other tokens, not over those that hold other experts;
- a width that is cut (tensor parallel) gives partial sums, added up once a token, after the combination of its choices.

Letters: R tokens of a device, J choices of each, P devices that share out the experts, E experts of one of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from layers import axes
from layers.experts import AXES, Experts, Weights
from layers.grouped_matmul import take_rows

Exchange = Literal["all_to_all", "gather"]


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """The experts that the tokens of one device may go to: first .. first + count - 1.

    over: mesh axes of the P devices that hold E = count / P of them each; () where all of them are here.
    weights: of the E that are here.
    """

    experts: Experts
    weights: Weights
    count: int
    first: int | jax.Array = 0
    over: tuple[str, ...] = ()

    @property
    def here(self) -> int:
        return self.weights["gate"].shape[0]

    @property
    def parts(self) -> int:
        return self.count // self.here

    def equal(self, x_NCD: jax.Array) -> jax.Array:
        """C rows for each of all experts: [N, C, D] -> [N, C, D], by two all-to-alls."""
        if not self.over:
            return self.experts(x_NCD, self.weights)
        x_ECD = jax.lax.all_to_all(x_NCD, self.over, split_axis=0, concat_axis=1, tiled=True)
        y_ECD = self.experts(x_ECD, self.weights)
        return jax.lax.all_to_all(y_ECD, self.over, split_axis=1, concat_axis=0, tiled=True)

    def sorted(self, x_SD: jax.Array, sizes_PE: jax.Array) -> jax.Array:
        """Rows for each device, S / P places each of which the first are filled, sorted by expert: sizes_PE int32 for
        each expert of each device. [S, D] -> [S, D]; places that are not filled come back as zeros.

        Rows, their numbers and the results are one all-to-all each.
        """
        if not self.over:
            return self.experts.grouped(x_SD, sizes_PE[0], self.weights)
        got_SD, sizes_PE = self._swap(x_SD), self._swap(sizes_PE)
        place_S = merged(sizes_PE, x_SD.shape[0] // self.parts)
        rows_S = jnp.arange(place_S.size, dtype=jnp.int32)
        row_S = jnp.full(place_S.size, place_S.size, jnp.int32).at[place_S].set(rows_S, mode="drop")
        x_SD = take_rows(got_SD, row_S, place_S[:, None])
        y_SD = self.experts.grouped(x_SD, jnp.sum(sizes_PE, 0, dtype=jnp.int32), self.weights)
        return self._swap(take_rows(y_SD, place_S, row_S[:, None]))

    def _swap(self, x):
        return jax.lax.all_to_all(x, self.over, split_axis=0, concat_axis=0, tiled=True)


def merged(sizes_PE: jax.Array, room: int) -> jax.Array:
    """Where rows that P devices sent, each sorted by expert in `room` places, lie when all are sorted by expert: int32
    [P room], past the end for places without a row. Rows of one expert keep the order of their devices."""
    P = sizes_PE.shape[0]
    ends_PE = jnp.cumsum(sizes_PE, 1)
    place_C = jnp.arange(room, dtype=jnp.int32)
    expert_PC = jnp.sum(place_C[:, None] >= ends_PE[:, None], -1, dtype=jnp.int32)
    expert_PC = jnp.minimum(expert_PC, sizes_PE.shape[1] - 1)
    total_E = jnp.sum(sizes_PE, 0)
    first_PE = jnp.cumsum(total_E) - total_E + jnp.cumsum(sizes_PE, 0) - sizes_PE
    shift_PE = first_PE - (ends_PE - sizes_PE)
    merged_PC = jnp.take_along_axis(shift_PE, expert_PC, 1) + place_C
    return jnp.reshape(jnp.where(place_C < ends_PE[:, -1:], merged_PC, P * room), -1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mesh axes, among those still open here, that cut the batch, the length, the experts, their input and their
    inner width."""

    batch: tuple[str, ...]
    length: tuple[str, ...]
    experts: tuple[str, ...]
    embed: tuple[str, ...]
    mlp: tuple[str, ...]

    @classmethod
    def here(cls) -> "Spread":
        return cls(*(axes.mesh_axes(axis) for axis in ("batch", "length", "experts", "embed", "mlp")))

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.batch + self.length

    @property
    def over(self) -> tuple[str, ...]:
        """All but those that cut the input alone: the compiler gathers over these."""
        return tuple(dict.fromkeys(self.tokens + self.experts + self.mlp))


def spread() -> bool:
    """Whether a mesh cuts tokens or experts here."""
    return bool(Spread.here().over)


def whole_on_devices(rows: int) -> bool:
    """Whether each device holds as many of the `rows` rows (or groups of rows) as any other, and holds them whole."""
    where = Spread.here()
    return not where.length and rows % axes.mesh_size(where.batch) == 0


def on_each_device(
    run: Callable, experts: Experts, x_BTD: jax.Array, *others: jax.Array, exchange: Exchange = "all_to_all"
) -> tuple[jax.Array, jax.Array]:
    """run(LocalExperts, x_BTD, *others) -> (y_BTD, dropped) with the tokens of each device; dropped, a float32 scalar,
    is summed over devices. others: arrays [B, T, ...] that are cut as x is.

    exchange: "all_to_all" lets run send rows to the devices of their experts; "gather" brings the tokens of the P
    devices to each of them, which serves its own experts, and adds up the results. The latter also happens where
    experts lie on mesh axes that do not cut tokens: there every device has the tokens already.

    Raises ValueError where the experts do not divide over their devices.
    """
    where = Spread.here()
    if not where.over:
        return run(LocalExperts(experts, experts.weights, experts.count), x_BTD, *others)
    P = axes.mesh_size(where.experts)
    if experts.count % P:
        raise ValueError(
            f"Experts.count={experts.count} does not divide over the {P} devices of the mesh axes "
            f"{', '.join(where.experts)}: change it, or their size in Mesh.shape"
        )
    x_BTD = axes.constrain(x_BTD, "batch", "length", None)
    swap = exchange == "all_to_all" and set(where.experts) <= set(where.tokens)
    # Devices along these axes serve the same tokens, each with its own experts or its own part of their width.
    shared = (() if swap else where.experts) + where.mlp
    residual, rest = axes.mesh_axes("residual_length"), tuple(name for name in shared if name not in where.tokens)
    # The residual stream may lie in parts over devices that share tokens: each then keeps its part of the sum.
    scatter = residual == where.length + rest and x_BTD.shape[1] % axes.mesh_size(residual) == 0
    copies = axes.mesh_size(tuple(name for name in where.mlp if name in where.tokens))
    counted = tuple(dict.fromkeys(where.tokens + (() if swap else where.experts)))

    def local(weights, *per_token):
        weights = {name: _whole(weight, AXES[name], where) for name, weight in weights.items()}
        per_token = [_fetch(x, where, shared) for x in per_token]
        count, first = (experts.count, 0) if swap else (experts.count // P, _index(where.experts) * experts.count // P)
        y_BTD, dropped = run(LocalExperts(experts, weights, count, first, where.experts if swap else ()), *per_token)
        if rest and scatter:
            y_BTD = jax.lax.psum_scatter(y_BTD, rest, scatter_dimension=1, tiled=True)
        elif rest:
            y_BTD = jax.lax.psum(y_BTD, rest)
        return _keep_own(y_BTD, where, shared), jax.lax.psum(dropped, counted) / copies if counted else dropped

    per_token = [("batch", "length", *(None,) * (x.ndim - 2)) for x in (x_BTD, *others)]
    outputs = (("batch", "residual_length" if rest and scatter else "length", None), ())
    mapped = axes.shard_map(local, over=where.over, inputs=(AXES, *per_token), outputs=outputs)
    return mapped(experts.weights, x_BTD, *others)


def _index(names: tuple[str, ...]) -> int | jax.Array:
    return jax.lax.axis_index(names) if names else 0


def _whole(weight, names, where: Spread):
    """A weight with its model width whole. It varies over all devices from here on, so that its gradient is added up
    over those that do not cut it."""
    embed = tuple(name for name in where.embed if name in where.over)
    if embed:
        weight = jax.lax.all_gather(weight, embed, axis=names.index("embed"), tiled=True)
    return _varying(weight, where, where.experts + where.mlp + embed)


def _fetch(x, where: Spread, shared: tuple[str, ...]):
    """What the devices along `shared` have of the same tokens, on each of them."""
    for axis, names in enumerate((where.batch, where.length)):
        cut = tuple(name for name in names if name in shared)
        x = jax.lax.all_gather(x, cut, axis=axis, tiled=True) if cut else x
    return _varying(x, where, where.tokens) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _keep_own(y, where: Spread, shared: tuple[str, ...]):
    """The sum over the devices along `shared` that had different tokens, of which each keeps its own."""
    for axis, names in enumerate((where.batch, where.length)):
        cut = tuple(name for name in names if name in shared)
        y = jax.lax.psum_scatter(y, cut, scatter_dimension=axis, tiled=True) if cut else y
    return y


def _varying(x, where: Spread, already: tuple[str, ...]):
    missing = tuple(name for name in where.over if name not in already)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
