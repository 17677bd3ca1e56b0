"""The vocabulary of logical axes, and the functions that use it: `param`, `buffer`, `constrain`, `shard_map`.

A parameter says what each of its dimensions *means*. Sharding rules, Muon's matrix view, weight-decay masks and the
parameter table all read that one tuple; names of parameters are never parsed.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

PARAMETER_AXES = {
    "vocab": "token ids",
    "embed": "model width (D)",
    "embed_out": "model width as the output side of a square projection, so that no array names one axis twice",
    "heads": "query heads (H)",
    "kv_heads": "key and value heads (G)",
    "head_dim": "width of a head (K)",
    "latent": "compressed width of queries, or of keys and values (MLA)",
    "latent_in": "the same as the input side of the projections from it",
    "mlp": "feed-forward width (F)",
    "experts": "experts (E)",
    "routed": "experts as a router scores them, those without weights included",
    "auxiliary": "hidden width of an auxiliary router",
    "groups": "groups of heads that share the keys and queries of a recurrent state",
    "state": "recurrent state width (N)",
    "taps": "convolution taps",
    "positions": "learned positions: absolute, or buckets of distances",
    "patch": "values of a patch of a picture",
    "code": "width of a quantizer's code",
    "norm": "a gain or an offset of a normalisation",
    "layers": "stacked layers (L), added by Stack",
}
ACTIVATION_AXES = {
    "batch": "examples (B)",
    "length": "positions (T)",
    "residual_length": "positions of the residual stream (T): between branches also spread over the devices that share "
    "a branch's heads or width, which need all positions only inside the branch",
    "act_embed": "model width of an activation (D)",
    "act_heads": "heads of an activation (H or G)",
    "act_mlp": "feed-forward width of an activation (F)",
    "act_vocab": "logits (V)",
    "cache_length": "positions of a decoding cache (S)",
    "matrices": "a stack of same-shape matrices that an optimizer orthogonalises (Muon.stack_shards)",
}

Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Axes = tuple[str | None, ...]


class Placement(Protocol):
    """Where logical axes lie: a mesh of devices, and two questions about it."""

    mesh: jax.sharding.Mesh

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes of more than one device over which a logical axis is spread, major first."""

    def activation(self, axes: Axes, shape: tuple[int, ...]) -> jax.sharding.PartitionSpec:
        """The PartitionSpec of an activation; refuses a dimension that does not divide."""


class Buffer(nnx.Variable):
    """Non-trained state of a module (a router bias, a running statistic): saved, never touched by the optimizer. Made
    by `buffer`."""


def keep(value: jax.Array, statistic: jax.Array) -> jax.Array:
    """The rule of a buffer that training does not change."""
    return value


def normal(stddev: float = 0.02) -> Init:
    """Gaussian initialiser with a fixed standard deviation."""
    return jax.nn.initializers.normal(stddev)


NORMAL = normal()


class Keys:
    """The keys of a tree of modules, in order of use; what `nnx.Rngs(params=key)` gives, which may stand in its place.

    Its counter is a plain number: the array that flax counts with makes tracing quadratic in the number of parameters.
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count += 1
        return key


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Init = NORMAL, *, exact: bool = False
) -> nnx.Param:
    """A float32 parameter that carries its logical axes as metadata `axes`.

    exact: it is used in float32 whatever the compute dtype (a router's weights, rates of decay), so that rounding
    neither flips a choice nor compounds over a row.

    Raises ValueError where the axes do not name every dimension, or name one that the vocabulary does not know.
    """
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} logical axes, got {axes}")
    unknown = [axis for axis in axes if axis not in PARAMETER_AXES]
    if unknown:
        raise ValueError(
            f"unknown logical axis {unknown[0]!r}: add it to layers/axes.py or use one of {sorted(PARAMETER_AXES)}"
        )
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, exact=exact)


Rule = Callable[[jax.Array, jax.Array], jax.Array]


class ByProgress:
    """Marks a rule of a buffer that changes over a run: its third argument is how far that is, the share of its steps
    that are done, float32 in [0, 1]."""


def moved(rule: Rule, value: jax.Array, statistic: jax.Array, progress: jax.Array) -> jax.Array:
    """The value of a buffer after a step."""
    return rule(value, statistic, progress) if isinstance(rule, ByProgress) else rule(value, statistic)


def buffer(value: jax.Array, axes: tuple[str, ...], rule: Rule = keep) -> Buffer:
    """A float32 Buffer that carries its logical axes and its rule.

    After every accepted step its value becomes `rule(value, statistic)`; the statistic is what the module gave to
    `measure`, averaged over the micro-batches. A rule is a pure function or a frozen dataclass (it is part of the
    module's static structure) and works on the last dimensions, for Stack puts a "layers" dimension in front of both.
    One that is `ByProgress` is called `rule(value, statistic, progress)`.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"a buffer of shape {value.shape} needs {value.ndim} logical axes, got {axes}")
    return Buffer(value.astype(jnp.float32), axes=axes, rule=rule)


@jax.custom_vjp
def measure(y: jax.Array, value: jax.Array, statistic: jax.Array) -> jax.Array:
    """y itself; on the way reports `statistic` (same shape as the buffer's `value`) to the buffer's rule.

    The statistic travels as the buffer's "gradient", so it arrives in the right place through scan, remat, sharding
    and micro-batches, over all tokens of the global batch, with nothing returned beside y. y must take part in the
    loss; any other use of the buffer goes through `jax.lax.stop_gradient`.
    """
    return y


def _measure_forward(y, value, statistic):
    return y, statistic.astype(value.dtype)


def _measure_backward(statistic, g):
    return g, statistic, jnp.zeros_like(statistic)


measure.defvjp(_measure_forward, _measure_backward)

_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def place_with(placement: Placement | None) -> Iterator[None]:
    """Inside this context `constrain`, `mesh_axes` and `shard_map` work on the mesh of `placement`."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def _open_mesh(placement: Placement) -> tuple[jax.sharding.Mesh | jax.sharding.AbstractMesh, frozenset[str]]:
    """The mesh as the code being traced sees it, and those of its axes that a shard_map around it has made its own."""
    surrounding = jax.sharding.get_abstract_mesh()
    taken = frozenset(surrounding.manual_axes)
    return (surrounding if taken else placement.mesh), taken


def _without(spec: jax.sharding.PartitionSpec, taken: frozenset[str]) -> jax.sharding.PartitionSpec:
    """A PartitionSpec that no longer names the axes in `taken`."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return _spec(tuple(name for name in names if name not in taken) for names in entries)


def _spec(entries: Iterable[tuple[str, ...]]) -> jax.sharding.PartitionSpec:
    """The PartitionSpec of the mesh axes of each dimension."""
    return jax.sharding.PartitionSpec(*(e if len(e) > 1 else e[0] if e else None for e in entries))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States what the dimensions of an activation mean; under a mesh this fixes its sharding, without one it is x."""
    placement = _placement.get()
    if placement is None:
        return x
    mesh, taken = _open_mesh(placement)
    whole = tuple(
        1 if axis is None else math.prod(mesh.shape[m] for m in taken & {*placement.mesh_axes(axis)}) for axis in axes
    )
    spec = placement.activation(axes, tuple(size * times for size, times in zip(x.shape, whole)))
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, _without(spec, taken)))


def device() -> jax.Device:
    """A device that what is traced here will run on: the first of the mesh, or of this process without one."""
    placement = _placement.get()
    return jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes over which a logical axis is spread and that are still whole here: () without a mesh, where the
    axis is replicated, and inside a `shard_map` over them."""
    placement = _placement.get()
    if placement is None:
        return ()
    _, taken = _open_mesh(placement)
    return tuple(name for name in placement.mesh_axes(axis) if name not in taken)


def shards(axis: str) -> int:
    """Over how many devices a logical axis is spread and still whole here, see `mesh_axes`."""
    return mesh_size(mesh_axes(axis))


def mesh_size(names: tuple[str, ...]) -> int:
    """How many devices lie along these mesh axes, 1 for ()."""
    placement = _placement.get()
    return 1 if placement is None else math.prod(placement.mesh.shape[name] for name in names)


def shard_map(function: Callable, *, over: tuple[str, ...], inputs: Any, outputs: Any, check: bool = True) -> Callable:
    """`function` as each device runs it on its own part of the arrays, free to use collectives (`jax.lax.psum`,
    `all_to_all`, `ppermute`) over the mesh axes `over`; all other mesh axes stay with the compiler.

    over: mesh axes, as `mesh_axes` gives them. inputs, outputs: for each argument (result) a tuple with the logical
    axis of each dimension, or a tree of such tuples as jax.shard_map takes specs; an axis that does not lie on `over`
    is not cut. May be nested: an inner one takes other mesh axes than an outer one. check: jax follows which values
    differ between devices, and refuses a loop whose start does not while its results do; False for a function that
    runs whole layers, which know nothing of it, and that differentiates no `psum`.

    Raises ValueError for a mesh axis that is not there, or that an outer shard_map has taken.
    """
    placement = _placement.get()
    mesh, taken = (None, frozenset()) if placement is None else _open_mesh(placement)
    known = () if mesh is None else tuple(mesh.shape)
    missing = [name for name in over if name not in known or name in taken]
    if missing or not over:
        raise ValueError(f"shard_map over {over}: the mesh axes open here are {[n for n in known if n not in taken]}")

    def spec(axes: Axes) -> jax.sharding.PartitionSpec:
        return _spec(() if axis is None else tuple(m for m in placement.mesh_axes(axis) if m in over) for axis in axes)

    def is_axes(leaf: Any) -> bool:
        return isinstance(leaf, tuple) and all(axis is None or isinstance(axis, str) for axis in leaf)

    specs = (jax.tree.map(spec, tree, is_leaf=is_axes) for tree in (inputs, outputs))
    return jax.shard_map(
        function, mesh=mesh, in_specs=next(specs), out_specs=next(specs), axis_names={*over}, check_vma=check
    )


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *, like: jax.Array) -> jax.Array:
    """Zeros that inside a shard_map vary over the mesh axes of `like`: what a loop over such arrays starts from."""
    some = jax.lax.stop_gradient(jnp.ravel(like)[0])
    return jnp.zeros(shape, dtype) + jnp.where(some == some, 0, 0).astype(dtype)
