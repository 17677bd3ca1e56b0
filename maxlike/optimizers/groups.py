"""Which parameters an optimizer treats alike, decided from their logical axes; and the last link of every optimizer."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from layers.axes import PARAMETER_AXES
from maxlike.errors import UserError
from maxlike.schedules import Rate

Kind = Literal["matrix", "embedding", "vector"]

STACKS = ("layers", "experts", "routed")  # in front of the other axes these count matrices, they are no side of one
# Neighbours among these are one side: heads * head_dim, groups * state.
HEADS = ("heads", "kv_heads", "groups", "head_dim", "state")
TABLES = ("vocab", "positions")  # rows looked up by an index, and the output head
VECTORS = ("norm", "taps")  # gains, offsets, convolution taps: no matrix whatever their shape


@dataclasses.dataclass(frozen=True)
class View:
    """How a parameter is a stack of matrices: its first `stack` axes count them, the next `rows` are the input side."""

    stack: int
    rows: int

    def of(self, x: jax.Array) -> jax.Array:
        """x as [..., rows, columns]."""
        split = self.stack + self.rows
        return x.reshape(*x.shape[: self.stack], _product(x.shape[self.stack : split]), _product(x.shape[split:]))


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def sides(axes: tuple[str, ...]) -> tuple[int, list[tuple[str, ...]]]:
    """(number of leading stack axes, the sides of the array behind them).

    ('layers', 'embed', 'heads', 'head_dim') -> 1, [('embed',), ('heads', 'head_dim')];
    ('experts', 'mlp', 'embed') -> 1, [('mlp',), ('embed',)];
    a router, ('embed', 'routed') -> 0, [('embed',), ('routed',)].
    """
    stack = 0
    while stack < len(axes) and axes[stack] in STACKS:
        stack += 1
    found: list[tuple[str, ...]] = []
    for axis in axes[stack:]:
        if found and axis in HEADS and found[-1][-1] in HEADS:
            found[-1] += (axis,)
        else:
            found.append((axis,))
    return stack, found


def view(axes: tuple[str, ...]) -> View:
    """The matrix view of a parameter that has two sides."""
    stack, (rows, _) = sides(axes)
    return View(stack, len(rows))


def kind(path: str, axes: tuple[str, ...]) -> Kind:
    """matrix: two sides; embedding: two sides of which one is a table's index (token table, learned positions, output
    head); vector: at most one side (biases, scalars) or an axis that makes it one (norm gains, taps).

    Raises UserError for a parameter that is none of these, or two.
    """
    unknown = [axis for axis in axes if axis not in PARAMETER_AXES]
    if unknown:
        raise UserError(f"parameter {path} has the unknown logical axis {unknown[0]!r}: name it in layers/axes.py.")
    number = len(sides(axes)[1])
    vector = number < 2 or any(axis in VECTORS for axis in axes)
    embedding = number == 2 and any(axis in TABLES for axis in axes)
    matrix = number == 2 and not embedding and not vector
    found = [name for name, holds in (("matrix", matrix), ("embedding", embedding), ("vector", vector)) if holds]
    if len(found) != 1:
        raise UserError(
            f"parameter {path} with axes {axes} belongs to {' and '.join(found) if found else 'no'} optimizer group "
            "(matrix, embedding, vector): give it axes that say which, see maxlike/optimizers/groups.py."
        )
    return found[0]


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def kinds(axes: dict) -> dict:
    """The kind of each parameter, in the parameters' own tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kind(_name(path), leaf), axes, is_leaf=_is_axes)


@dataclasses.dataclass(frozen=True)
class Rule:
    """decay: weight decay, multiplied by the learning rate. lr_ratio: this group's rate in units of the schedule's."""

    decay: float
    lr_ratio: float = 1.0


def rules(weight_decay: float, decay_embeddings: bool = True, embedding_lr_ratio: float = 1.0) -> dict[Kind, Rule]:
    """Matrices decay, gains and biases do not, embeddings as asked."""
    return {
        "matrix": Rule(weight_decay),
        "embedding": Rule(weight_decay if decay_embeddings else 0.0, embedding_lr_ratio),
        "vector": Rule(0.0),
    }


def describe(axes: dict, name: str, rules: dict[Kind, Rule]) -> dict[str, str]:
    """path -> for example 'adamw matrix, decay 0.1, lr x 1'."""
    flat = jax.tree_util.tree_flatten_with_path(kinds(axes))[0]
    return {
        _name(path): f"{name} {kind}, decay {rules[kind].decay:g}, lr x {rules[kind].lr_ratio:g}" for path, kind in flat
    }


def descend(axes: dict, rules: dict[Kind, Rule], rate: Rate) -> optax.GradientTransformation:
    """update = -rate(count) * lr_ratio * (direction + decay * parameter): decoupled decay, after any scaling."""
    rule_of = jax.tree.map(lambda kind: rules[kind], kinds(axes))

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(directions, state, params):
        lr = rate(state.count)

        def step(rule, direction, parameter):
            if rule.decay:
                direction = direction + rule.decay * parameter
            return -(lr * rule.lr_ratio) * direction

        updates = jax.tree.map(step, rule_of, directions, params)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def select(tree: Any, labels: Any, label: str) -> dict:
    """The leaves of nested dicts that carry `label`, at their own paths; branches without any disappear."""
    if not isinstance(labels, dict):
        return tree if labels == label else {}
    kept = {key: select(tree[key], labels[key], label) for key in labels}
    return {key: part for key, part in kept.items() if not (isinstance(part, dict) and not part)}


def join(parts: list[dict]) -> dict:
    """The union of nested dicts that share no leaf."""
    joined: dict = {}
    for part in parts:
        for key, value in part.items():
            joined[key] = join([joined[key], value]) if key in joined else value
    return joined


def partition(transforms: dict[str, optax.GradientTransformation], labels: dict) -> optax.GradientTransformation:
    """One transformation for each label, each seeing only its own parameters.

    Unlike optax.partition it leaves no placeholders: the state of a label is a tree of exactly its parameters, at their
    own paths, which sharding and checkpoints read.
    """

    def init(params):
        return {label: transform.init(select(params, labels, label)) for label, transform in transforms.items()}

    def update(updates, state, params):
        results = {
            label: transform.update(select(updates, labels, label), state[label], select(params, labels, label))
            for label, transform in transforms.items()
        }
        return join([part for part, _ in results.values()]), {label: new for label, (_, new) in results.items()}

    return optax.GradientTransformation(init, update)


def nonnegative(knob: str, value: float) -> float:
    """The value, or a UserError that names the knob."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{knob}={value} must not be negative.")
    return value


def fraction(knob: str, value: float) -> float:
    """The value of a decay rate in [0, 1), or a UserError that names the knob."""
    if not 0 <= value < 1:
        raise UserError(f"{knob}={value} is outside [0, 1).")
    return value
