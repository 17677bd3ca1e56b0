"""A mesh without devices, and how it divides the work of one: what the analytic estimate needs to know of a layout."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

import jax
from jax.sharding import AbstractMesh, AxisType

from layers.moe import MoE
from layers.parts import named_parts
from layers.pipeline import Circular, bubble
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.one_f_one_b import OneFOneB
from maxlike.pipelines import schedule
from maxlike.sharding import Layout, flat_axes, path_names

# Logical axes of parameters whose cut divides the work on a token, not only the storage.
_WORK = ("heads", "kv_heads", "mlp", "vocab", "groups", "positions")


def abstract_layout(experiment: Experiment, devices: int) -> Layout:
    """The experiment's mesh over so many devices that need not exist. Raises UserError as `Mesh.open` does."""
    sizes = experiment.mesh.sizes(devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(mesh, experiment.mesh.rules, experiment.mesh.balance, experiment.mesh.keys)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter as a layout cuts it.

    size: elements. layers: how many layers are stacked in it, 1 where none. cut: mesh axes that divide the work with it
    (tensor, expert, stage). stored: those that divide only its storage, over which it is gathered before use.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layers: int
    cut: tuple[str, ...]
    stored: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Shares:
    """Into how many parts a layout cuts rows, positions, widths and layers, and the weights with them."""

    def __init__(self, experiment: Experiment, layout: Layout):
        self.layout, self._width_parts = layout, {}
        self.sizes = dict(layout.mesh.shape)
        self.batch_axes, self.length_axes = layout.mesh_axes("batch"), layout.mesh_axes("length")
        self.tensor_axes = tuple(dict.fromkeys(a for name in ("act_heads", "act_mlp") for a in layout.mesh_axes(name)))
        self.stage_axes = layout.mesh_axes("layers")
        self.expert_axes = layout.mesh_axes("experts")
        self.batch, self.context, self.tensor, self.stage = (
            self.parts(axes) for axes in (self.batch_axes, self.length_axes, self.tensor_axes, self.stage_axes)
        )
        # Where positions of the residual stream lie on the tensor axes too, its arrays are cut like all others.
        residual = layout.mesh_axes("residual_length") if "residual_length" in layout.rules else ()
        self.sequence_parallel = bool(set(residual) & set(self.tensor_axes))
        self.weights = tuple(self._weights(experiment))
        # mixtures: (name, module) of each mixture of experts whose tokens choose.
        self.mixtures = tuple(named_parts(experiment.bare(), MoE).items())
        # ticks, repeats: micro-batches that a pipeline passes on, and how often each comes to a stage. bubble: what it
        # waits of a step.
        passed = schedule(experiment) if self.stage > 1 else None
        if self.stage > 1 and passed is None:
            raise UserError(
                f"the mesh has {self.stage} stages and Stack.pipeline=None: put `--overlay mesh/pipeline` on, or leave "
                "'stage' out of Mesh.shape"
            )
        self.one_f_one_b = isinstance(passed, OneFOneB)
        repeats = passed.repeats if isinstance(passed, Circular) else 1
        self._pass_on(1 if passed is None else passed.micro_batches, repeats)

    def _pass_on(self, ticks: int, repeats: int) -> None:
        self.ticks, self.repeats = ticks, repeats
        try:
            self.bubble = bubble("1f1b" if self.one_f_one_b else "circular", self.stage, self.ticks, self.repeats)
        except ValueError as error:
            raise UserError(str(error)) from error

    def with_ticks(self, ticks: int) -> "Shares":
        """The same with so many micro-batches in its pipeline, which goes round once."""
        other = copy.copy(self)
        other._pass_on(ticks, 1)
        return other

    def parts(self, axes: Iterable[str]) -> int:
        """Devices along some mesh axes."""
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    @property
    def turns(self) -> int:
        """How often a stage runs its layers, those times among them in which a pipeline fills and drains."""
        return 1 if self.stage == 1 else self.ticks * self.repeats + self.stage - 1

    def _weights(self, experiment: Experiment) -> Iterable[Weight]:
        model = experiment.abstract_model()
        by_path = flat_axes(model.axes)
        for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]:
            names = path_names(path)
            axes = by_path[names]
            self.layout.spec(axes, leaf.shape, "/".join(names))  # refuses what does not divide
            on = {axis: self.layout.mesh_axes(axis) for axis in axes}
            cut = tuple(m for axis in axes if axis in (*_WORK, "experts", "layers") for m in on[axis])
            stored = tuple(m for axis in axes for m in on[axis] if m not in cut)
            layers = leaf.shape[0] if axes[:1] == ("layers",) else 1
            yield Weight("/".join(names), leaf.shape, axes, layers, cut, stored)

    @functools.cached_property
    def cut_sizes(self) -> dict[int, int]:
        """Dimension -> parts: of the widths that the tensor axes cut, such as F, H, G and H K."""
        found: dict[int, int] = {}
        for weight in self.weights:
            for first, last in itertools.combinations(range(len(weight.shape) + 1), 2):
                on = [self.layout.mesh_axes(axis) for axis in weight.axes[first:last] if axis in _WORK]
                parts = self.parts({m for axes in on for m in axes})
                if on and parts > 1 and not {"layers", "experts", "embed"} & set(weight.axes[first:last]):
                    found[math.prod(weight.shape[first:last])] = parts
        return found

    def width_parts(self, sizes: frozenset[int]) -> int:
        """Into how many parts an array, or a product, with these dimensions is cut by width."""
        if sizes not in self._width_parts:  # a search asks for the same ones a thousand times
            self._width_parts[sizes] = max((self.cut_sizes.get(size, 1) for size in sizes), default=1)
        return self._width_parts[sizes]
