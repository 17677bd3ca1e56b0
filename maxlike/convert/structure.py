"""A network seen layer by layer: every parameter and every setting under a name that does not depend on how the layers
are grouped into scans, so that two networks can be compared."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np
from flax import nnx

from layers.axes import Buffer
from layers.dispatch import Capacity, Dropless
from layers.stack import Stack
from maxlike.errors import UserError

# Settings that say how a result is computed or a model trained, not which function it is. What weights cannot tell and
# need not: the losses and the jitter of a router, and how many experts its bias is meant to keep busy. (The rule of a
# bias is no setting but belongs to the buffer, and is not compared either.)
INERT = frozenset(
    [
        "Stack.remat", "Stack.scan", "Stack.repeats", "Stack.pipeline", "LanguageModel.padded_vocab",
        "EncoderDecoder.padded_vocab",
        "Embed.gradient_scale", "MoE.losses", "TopK.jitter", "TopK.expected", "Mamba2.chunk", "GatedDeltaNet.chunk",
    ]
)  # fmt: skip
SHOWN = 20


class Cannot(UserError):
    """A network that a family has no words for, or an option of a family that we have none for."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One layer's parameter: where its numbers are, and what they are.

    leaf: path of the array in the model's pure dict. index: this layer's place along the array's leading "layers"
    dimensions. shape, axes: of the rest; in `shape` the vocabulary is without padding, in `padded` with it.
    """

    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    padded: tuple[int, ...]
    axes: tuple[str, ...]
    buffer: bool


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value that is part of what the network computes. knob: its class and attribute, such as "Attention.window"."""

    knob: str
    value: Any


class Structure:
    """`parameters` and `settings` of a network by path, such as "stack/3/mixer/query/kernel" and
    "stack/3/mixer/window". A module's own path has a setting with its class."""

    def __init__(self, network: nnx.Module):
        self.parameters: dict[str, Parameter] = {}
        self.settings: dict[str, Setting] = {}
        self.depths: dict[str, int] = {}
        self._vocab = _sizes_of_vocabulary(network)
        self._walk(network, "", "", (), "")

    def has(self, path: str) -> bool:
        """Whether there is such a parameter."""
        return path in self.parameters

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a layer's parameter. Raises Cannot where there is none."""
        if path not in self.parameters:
            raise Cannot(f"the network has no parameter {path}")
        return self.parameters[path].shape

    def value(self, path: str) -> Any:
        """A setting. Raises Cannot where there is none."""
        if path not in self.settings:
            raise Cannot(f"the network has no setting {path}")
        return self.settings[path].value

    def depth(self, stack: str = "stack") -> int:
        """Number of layers of a stack."""
        if stack not in self.depths:
            raise Cannot(f"the network has no stack {stack!r}")
        return self.depths[stack]

    def _walk(self, node: Any, path: str, leaf: str, index: tuple[int, ...], knob: str) -> None:
        if isinstance(node, nnx.Variable):
            self._variable(node, path, leaf, index)
        elif isinstance(node, Stack):
            self._stack(node, path, leaf, index)
        elif isinstance(node, nnx.List):
            for i, item in enumerate(node):
                self._walk(item, f"{path}/{i}", f"{leaf}/{i}", index, knob)
        elif isinstance(node, nnx.Module):
            name = type(node).__name__
            self.settings[path] = Setting(knob, name)
            for attribute, value in vars(node).items():
                if not attribute.startswith("_pytree__") and f"{name}.{attribute}" not in INERT:
                    self._walk(value, *(_join(at, attribute) for at in (path, leaf)), index, f"{name}.{attribute}")
        elif isinstance(node, Dropless) or (isinstance(node, Capacity) and node.evaluation_factor is None):
            pass  # where a model is evaluated they do the same: every choice is computed
        elif dataclasses.is_dataclass(node):
            self._dataclass(node, path, knob)
        else:
            self.settings[path] = Setting(knob, node)

    def _dataclass(self, node: Any, path: str, knob: str) -> None:
        """A value with fields, such as RoPE: itself, and its fields for a table that names them."""
        self.settings[path] = Setting(knob, node)
        name = type(node).__name__
        for field in dataclasses.fields(node):
            value, at = vars(node)[field.name], f"{path}.{field.name}"
            if dataclasses.is_dataclass(value):
                self._dataclass(value, at, f"{name}.{field.name}")
            else:
                self.settings[at] = Setting(f"{name}.{field.name}", value)

    def _stack(self, stack: Stack, path: str, leaf: str, index: tuple[int, ...]) -> None:
        size = len(stack.periods)
        layers = [(block, f"{leaf}/prefix/{i}", index) for i, block in enumerate(stack.prefix)]
        layers += [
            (stack.periods[i], f"{leaf}/periods/{i}", (*index, r)) for r in range(stack.repeats) for i in range(size)
        ]
        layers += [(block, f"{leaf}/suffix/{i}", index) for i, block in enumerate(stack.suffix)]
        self.depths[path] = len(layers)
        for i, (block, at, where) in enumerate(layers):
            self._walk(block, f"{path}/{i}", at, where, "Stack.pattern")

    def _variable(self, variable: nnx.Variable, path: str, leaf: str, index: tuple[int, ...]) -> None:
        shape, axes = tuple(variable.shape), tuple(variable.get_metadata("axes"))
        padded, axes = shape[len(index) :], axes[len(index) :]
        shape = tuple(self._vocab.get(n, n) if axis == "vocab" else n for n, axis in zip(padded, axes, strict=True))
        self.parameters[path] = Parameter(leaf, index, shape, padded, axes, isinstance(variable, Buffer))


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _sizes_of_vocabulary(network: nnx.Module) -> dict[int, int]:
    """{padded size: true size}."""
    known = vars(network)
    return {known["padded_vocab"]: known["vocab"]} if "padded_vocab" in known else {}


def of(factory: Any) -> Structure:
    """The structure of what `factory(rngs=...)` builds, without computing a number."""
    graph, state = jax.eval_shape(lambda: nnx.split(factory(rngs=nnx.Rngs(params=0))))
    return Structure(nnx.merge(graph, state))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, functools.partial) and isinstance(b, functools.partial):
        return a.func == b.func and _same(a.args, b.args) and _same(a.keywords, b.keywords)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray | jax.Array) or isinstance(b, np.ndarray | jax.Array):
        return np.array_equal(a, b)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)  # one may have been computed, the other written down
    return type(a) is type(b) and a == b


def difference(a: Structure, b: Structure, columns: tuple[str, str]) -> str | None:
    """A table of what differs between two networks, a line for all layers where it is the same; None where they are
    equal. `columns` names the two."""
    found: dict[tuple[str, str, str, str], list[str]] = {}

    def note(path: str, knob: str, left: str, right: str) -> None:
        layer = re.search(r"/(\d+)(/|$)", path)
        row = (re.sub(r"/\d+(?=/|$)", "/*", path, count=1), knob, left, right)
        found.setdefault(row, []).append(layer[1] if layer else "")

    for path in a.parameters | b.parameters:
        shapes = [str(list(net.parameters[path].shape)) if net.has(path) else "none" for net in (a, b)]
        if shapes[0] != shapes[1]:
            note(path, "parameter", *shapes)
    for path, setting in (b.settings | a.settings).items():
        values = [net.settings.get(path) for net in (a, b)]
        both = None not in values
        if both and dataclasses.is_dataclass(values[0].value) and type(values[0].value) is type(values[1].value):
            continue  # its fields have lines of their own
        if not both or not _same(values[0].value, values[1].value):
            note(path, setting.knob, *("none" if value is None else f"{value.value!r}" for value in values))
    if not found:
        return None
    rows = [("where", "layers", "knob", *columns)]
    for (path, knob, left, right), layers in found.items():
        rows.append((path, _span(layers), knob, left[:60], right[:60]))
    more = [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN + 1 else []
    rows = rows[: SHOWN + 1]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + more)


def _span(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
