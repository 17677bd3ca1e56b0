"""The device mesh and the rules that map logical axes to it. Rules live in `experiments/mesh/*.gin` and nowhere else.

`Mesh` is what an experiment binds; `Mesh.open()` gives a `Layout`: a real `jax.sharding.Mesh` with one function,
`spec`, that turns the logical axes of an array into a PartitionSpec and refuses whatever it does not know. Nothing is
replicated because a dimension happened not to divide.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.axes import ACTIVATION_AXES, PARAMETER_AXES
from maxlike.catalog import nearest
from maxlike.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
# What sets a dimension, where it has a knob of its own.
SIZES = {
    "layers": "Stack.depth (this many times the length of Stack.pattern)",
    "experts": "Experts.count (ModalityMoE.groups)",
    "batch": "Experiment.batch_size (Step.micro_batches)",
    "length": "Experiment.sequence_length",
    "residual_length": "Experiment.sequence_length",
}
# An optimizer's leaf above this size that mirrors no parameter is refused rather than replicated.
REPLICATE_UP_TO = 1 << 16

Rule = str | tuple[str, ...] | None


class Mesh:
    """Names and sizes of the mesh axes, and which logical axis lies on which of them.

    shape: mesh axis -> size, from `data fsdp tensor context expert stage`; one size may be -1: all remaining devices.
        Axes left out, and axes of size 1, vanish.
    rules: logical axis -> mesh axis, a tuple of them, or None for replicated. Every logical axis that an array uses
        must have a rule.
    balance: whether rows cut along their length lie in head-tail order, which gives devices equal work under causality
        (`maxlike.row_order`): None wherever the network allows it and gains by it, True or refused, False never.
    keys: how attention gets the keys of other devices there: "ring", "gather" (C times the memory, one collective
        instead of C - 1), or None for the choice of `layers.kernels`.
    across_slices: on several slices (hosts of GPUs), the mesh axes that may cross from one to another over the slow
        network between them, the first that divide: axes not named here lie inside a slice.

    Raises UserError for an unknown mesh axis or logical axis, a size below 1, or two sizes of -1.
    """

    def __init__(
        self,
        *,
        shape: dict[str, int],
        rules: dict[str, str | tuple[str, ...] | None],
        balance: bool | None = None,
        keys: Literal["ring", "gather"] | None = None,
        across_slices: tuple[str, ...] = ("data", "stage", "fsdp"),
    ):
        if keys not in (None, "ring", "gather"):
            raise UserError(f"Mesh.keys={keys!r} must be 'ring', 'gather' or None")
        for axis, size in shape.items():
            if axis not in MESH_AXES:
                raise UserError(
                    f"Mesh.shape names {axis!r}{nearest(axis, MESH_AXES)}; mesh axes are {', '.join(MESH_AXES)}"
                )
            if size < 1 and size != -1:
                raise UserError(
                    f"Mesh.shape[{axis!r}]={size}: give a size of at least 1, or -1 for all remaining devices"
                )
        for axis in across_slices:
            if axis not in MESH_AXES:
                raise UserError(f"Mesh.across_slices names {axis!r}{nearest(axis, MESH_AXES)}, which is no mesh axis")
        if list(shape.values()).count(-1) > 1:
            raise UserError(f"Mesh.shape={shape} leaves two sizes open: only one may be -1")
        known = PARAMETER_AXES | ACTIVATION_AXES
        for logical, targets in rules.items():
            if logical not in known:
                raise UserError(
                    f"Mesh.rules names the logical axis {logical!r}{nearest(logical, known)}; see layers/axes.py"
                )
            for target in _tuple(targets):
                if target not in MESH_AXES:
                    raise UserError(
                        f"Mesh.rules[{logical!r}] names the mesh axis {target!r}{nearest(target, MESH_AXES)}"
                    )
        self.shape = dict(shape)
        self.rules = dict(rules)
        self.balance, self.keys, self.across_slices = balance, keys, tuple(across_slices)

    def sizes(self, devices: int) -> dict[str, int]:
        """Mesh axis -> size on so many devices, -1 filled in, axes of size 1 left out (but never all). Raises UserError
        where there are too few devices, or a cluster would have idle ones."""
        fixed = math.prod(size for size in self.shape.values() if size != -1)
        sizes = {axis: max(devices // fixed, 1) if size == -1 else size for axis, size in self.shape.items()}
        needed = math.prod(sizes.values())
        if needed > devices:
            raise UserError(
                f"Mesh.shape={self.shape} needs {needed} devices and there are {devices}: "
                "lower a size, use -1, or try `--overlay mesh/single`"
            )
        if needed < devices and (jax.process_count() > 1 or -1 in self.shape.values()):
            raise UserError(
                f"Mesh.shape={self.shape} covers {needed} of {devices} devices: its sizes must multiply to {devices}"
            )
        return {axis: size for axis, size in sizes.items() if size > 1} or {"data": 1}

    def open(self, devices: Sequence[jax.Device] | None = None) -> "Layout":
        """The mesh on real devices. Raises UserError where there are too few, or a cluster would have idle ones."""
        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        needed = math.prod(sizes.values())
        types, devices = (AxisType.Auto,) * len(sizes), devices[:needed]
        mesh = jax.sharding.Mesh(self.arrange(sizes, devices), tuple(sizes), axis_types=types)
        return Layout(mesh, self.rules, self.balance, self.keys)

    def arrange(self, sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
        """Devices as an array with one dimension a mesh axis: slices along `across_slices`, outer, and each slice's own
        network inside. A mesh axis that is no product of the torus's sides (2 x 32 on 8 x 8) shares a side with
        another. Raises UserError where slices differ in size or do not divide."""
        members = slices(devices)
        if len(members) == 1:
            return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        if len(set(members.values())) > 1:
            raise UserError(f"the slices have different numbers of devices, {members}: a mesh needs them alike")
        outer = self.outer(sizes, len(members))
        inner = [size // outer[axis] for axis, size in sizes.items()]
        across = [outer[axis] for axis in sizes]
        return mesh_utils.create_hybrid_device_mesh(inner, across, devices, allow_split_physical_axes=True)

    def outer(self, sizes: dict[str, int], slices: int) -> dict[str, int]:
        """Mesh axis -> over how many slices it goes; inside a slice lie its size over this. Raises UserError where
        `across_slices` do not divide over the slices."""
        outer, left = dict.fromkeys(sizes, 1), slices
        for axis in self.across_slices:
            if axis in sizes:
                outer[axis] = math.gcd(sizes[axis], left)
                left //= outer[axis]
        if left > 1:
            raise UserError(
                f"Mesh.across_slices={self.across_slices} of Mesh.shape={self.shape} do not divide over "
                f"{slices} slices: give one of them a multiple of {slices} (`--overlay mesh/hsdp`)"
            )
        return outer


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh on devices with its rules; balance and keys: of Mesh."""

    mesh: jax.sharding.Mesh
    rules: dict[str, Rule]
    balance: bool | None = None
    keys: str | None = None

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> PartitionSpec:
        """PartitionSpec of an array. `name` is the parameter or activation, for the message.

        Raises UserError for a logical axis without a rule, a mesh axis used twice, or a dimension that does not divide.
        """
        if len(axes) != len(shape):
            raise UserError(
                f"{name} of shape {shape} carries {len(axes)} logical axes {axes}: one a dimension is needed"
            )
        entries: list[tuple[str, ...] | str | None] = []
        taken: dict[str, str] = {}
        for logical, size in zip(axes, shape):
            if logical is None:
                entries.append(None)
                continue
            if logical not in self.rules:
                raise UserError(
                    f"no rule says where the logical axis {logical!r} of {name} lies"
                    f"{nearest(logical, self.rules)}; add it to Mesh.rules (None replicates)"
                )
            targets = self.mesh_axes(logical)
            for target in targets:
                if target in taken:
                    raise UserError(
                        f"{name}: the logical axes {taken[target]!r} and {logical!r} both lie on the mesh axis "
                        f"{target!r}; change one of the two in Mesh.rules"
                    )
                taken[target] = logical
            parts = math.prod(self.mesh.shape[t] for t in targets)
            if size % parts:
                raise UserError(
                    f"{name}: its dimension {logical!r} of size {size} does not divide over "
                    f"{' x '.join(f'{t}={self.mesh.shape[t]}' for t in targets)}; "
                    f"change {SIZES.get(logical, 'that size')} or Mesh.shape"
                )
            entries.append(targets if len(targets) > 1 else targets[0] if targets else None)
        return PartitionSpec(*entries)

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes of more than one device over which a logical axis is spread, major first. Raises UserError for
        a logical axis without a rule."""
        if axis not in self.rules:
            raise UserError(
                f"no rule says where the logical axis {axis!r} lies{nearest(axis, self.rules)}; add it to Mesh.rules "
                "(None replicates)"
            )
        return tuple(t for t in _tuple(self.rules[axis]) if t in self.mesh.shape and self.mesh.shape[t] > 1)

    def activation(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """What `layers.axes.constrain` asks for."""
        return self.spec(axes, shape, f"an activation {axes}")

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of a batch of examples [B, T, ...]."""
        return self.sharding(("batch", "length")[: len(shape)] + (None,) * (len(shape) - 2), shape, "the batch")

    def check_rows(self, rows: int) -> None:
        """Raises UserError where the rows of a micro-batch, which the devices work on at a time, do not divide."""
        names = self.mesh_axes("batch")
        parts = math.prod(self.mesh.shape[name] for name in names)
        if rows % parts:
            raise UserError(
                f"a micro-batch of {rows} rows (Experiment.batch_size / Step.micro_batches) does not divide over the "
                f"{parts} devices of {' x '.join(names)}: change one of the three"
            )


def slices(devices: Sequence[jax.Device]) -> dict[int, int]:
    """Slice -> number of these devices in it: TPU slices, or GPU hosts, between which the network is slow. One slice
    where the platform has no such thing."""
    counts = collections.Counter(device.slice_index if hasattr(device, "slice_index") else 0 for device in devices)
    return dict(sorted(counts.items()))


def path_names(path: tuple) -> tuple[str, ...]:
    """A jax key path as names: dictionary keys, attributes and indices alike."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def flat_axes(axes: Any) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The tree of logical axes as parameter path -> axes."""
    flat = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))[0]
    return {path_names(path): leaf for path, leaf in flat}


def state_shardings(state: Any, params: Any, axes: Any, layout: Layout) -> Any:
    """One sharding tree for a whole train state.

    A leaf whose path ends in a parameter's path and has its shape lies where the parameter lies: parameters, gradients,
    moments, averages. A scalar is replicated, and so are the sums over rows and columns that an optimizer keeps of a
    parameter (Adafactor), which are smaller by a dimension, and small leaves that mirror nothing. Anything else is
    refused: a moment must not be replicated by accident.
    """
    by_path = flat_axes(axes)
    shapes = {path_names(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = path_names(path)
        owner = next((names[i:] for i in range(len(names)) if names[i:] in by_path), None)
        if owner is not None and leaf.shape == shapes[owner]:
            return layout.sharding(by_path[owner], leaf.shape, "/".join(owner))
        if math.prod(leaf.shape) <= REPLICATE_UP_TO or owner is not None:
            return layout.replicated
        raise UserError(
            f"the state leaf {'/'.join(names)} of shape {leaf.shape} mirrors no parameter, so no rule places it; "
            "an optimizer must keep its large state in trees shaped like the parameters"
        )

    return jax.tree_util.tree_map_with_path(place, state)


def _tuple(rule: Rule) -> tuple[str, ...]:
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)
